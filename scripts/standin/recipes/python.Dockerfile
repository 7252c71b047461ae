# Stands in for python:X.Y-slim-CODENAME: Debian's interpreter where the official image has its own.
ARG BASE
FROM ${BASE}
ARG PYTHON
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
        ca-certificates netbase tzdata "python${PYTHON}" "python${PYTHON}-venv" python3-pip >/dev/null \
    && rm -rf /var/lib/apt/lists/* /usr/lib/python3*/EXTERNALLY-MANAGED \
    && for name in python python3 "python${PYTHON}"; do ln -s "/usr/bin/python${PYTHON}" "/usr/local/bin/$name"; done \
    && ln -s /usr/bin/pip3 /usr/local/bin/pip
COPY machine/ pip/ /
ENV LANG=C.UTF-8 SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
CMD ["python3"]
