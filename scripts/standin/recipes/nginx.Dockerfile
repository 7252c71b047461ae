# Stands in for the nginx images (official and unprivileged): sid's nginx, the same user, paths and stop signal.
ARG BASE
FROM ${BASE}
ARG MIRROR
RUN echo "deb ${MIRROR} sid main" >/etc/apt/sources.list.d/sid.list \
    && printf 'Package: *\nPin: release a=unstable\nPin-Priority: 100\n' >/etc/apt/preferences.d/sid \
    && apt-get -o Acquire::Check-Valid-Until=false update -qq \
    && groupadd --system --gid 101 nginx && useradd --system --uid 101 --gid 101 --no-create-home nginx \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends -t sid \
        nginx openssl ca-certificates gettext-base busybox >/dev/null \
    && rm -rf /var/lib/apt/lists/* /etc/nginx/sites-* /etc/nginx/nginx.conf /etc/nginx/modules-enabled/* \
    && mkdir -p /etc/nginx/conf.d /docker-entrypoint.d /var/cache/nginx && chown nginx:nginx /var/cache/nginx \
    && ln -sf /dev/stdout /var/log/nginx/access.log && ln -sf /dev/stderr /var/log/nginx/error.log \
    && for applet in wget nc; do ln -s /bin/busybox "/usr/local/bin/$applet"; done
COPY nginx.conf /etc/nginx/nginx.conf
COPY nginx-entrypoint.sh /docker-entrypoint.sh
COPY machine/ /
STOPSIGNAL SIGQUIT
ENTRYPOINT ["/docker-entrypoint.sh"]
CMD ["nginx", "-g", "daemon off;"]
