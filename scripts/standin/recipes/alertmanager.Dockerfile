# Stands in for prom/alertmanager: sid's program under the official image's paths and user.
ARG BASE
FROM ${BASE}
ARG MIRROR
RUN echo "deb ${MIRROR} sid main" >/etc/apt/sources.list.d/sid.list \
    && printf 'Package: *\nPin: release a=unstable\nPin-Priority: 100\n' >/etc/apt/preferences.d/sid \
    && apt-get -o Acquire::Check-Valid-Until=false update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends -t sid \
        prometheus-alertmanager ca-certificates busybox >/dev/null \
    && rm -rf /var/lib/apt/lists/* /etc/prometheus && mkdir -p /etc/alertmanager /alertmanager && chown nobody:nogroup /alertmanager \
    && ln -sf /usr/bin/prometheus-alertmanager /bin/alertmanager; ln -s /bin/busybox /usr/local/bin/wget
USER nobody
WORKDIR /alertmanager
VOLUME /alertmanager
ENTRYPOINT ["/bin/alertmanager"]
CMD ["--config.file=/etc/alertmanager/alertmanager.yml", "--storage.path=/alertmanager"]
