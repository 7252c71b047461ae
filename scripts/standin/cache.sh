# Where the stand-in Docker keeps what it fetched and made; sourced by its neighbours.
# shellcheck shell=bash
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${APPLIANCE_CACHE:-$repository/.state/docker}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
tools=$cache/tools
# A unix socket's path may hold 108 characters, which a deep checkout exceeds: run-time files live under /run.
runtime=/run/appliance-docker-$(printf %s "$cache" | sha256sum | cut -c1-10)
socket=$runtime/docker.sock
say() { echo "standin: $*" >&2; }
die() { say "$*"; exit 1; }
# What this machine lacks, not what went wrong: 3 lets a caller skip instead of fail.
cannot() { say "$*"; exit 3; }
use_private_docker() {
    export PATH=$tools/usr/bin:$tools/usr/sbin:$PATH DOCKER_HOST=unix://$socket DOCKER_CONFIG=$cache/config
}
answers() { docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }
# Where this machine gets its own Debian packages, for its own release; DEBIAN_MIRROR names another.
debian_mirror() { # codename
    local site=${DEBIAN_MIRROR:-}
    [ -n "$site" ] || site=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' 2>/dev/null |
        awk -v release="$1" '$2 == release && $1 ~ /^http/ {print $1; exit}')
    [ -n "$site" ] || cannot "apt knows no Debian mirror for $1; name one with DEBIAN_MIRROR, or install Docker Engine"
    echo "$site"
}
