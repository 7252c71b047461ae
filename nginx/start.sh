#!/bin/sh
# Starts nginx in its container: takes the rendering for this nginx, reloads it when a certificate or an address changed.
set -eu
config=${EDGE_CONFIG:-/etc/edge/config}
certificates=${EDGE_CERTIFICATES:-/etc/edge/certificates}
version=$(nginx -v 2>&1 | sed 's|.*nginx/||; s|[^0-9.].*||')
older_or_same() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

chosen=
for candidate in $(ls "$config" | sed -n 's/^nginx-\(.*\)\.conf$/\1/p' | sort -V); do
    if older_or_same "$candidate" "$version"; then chosen=$config/nginx-$candidate.conf; fi
done
if [ -z "$chosen" ]; then
    echo "edge: no configuration for nginx $version in $config" >&2
    exit 1
fi
nginx -t -q -c "$chosen"

# What nginx reads only when it is (re)loaded. An nginx before 1.27.3 also needs a reload for the gateway's new address.
state() {
    cat "$chosen" "$certificates/fullchain.pem" "$certificates/privkey.pem" 2>/dev/null | cksum
    grep -q ' resolve ' "$chosen" || getent hosts gateway 2>/dev/null || :
}
watch() {
    while sleep 5; do
        now=$(state)
        [ "$now" = "$last" ] && continue
        # A half-written pair fails the test and is tried again at the next turn.
        if nginx -t -q -c "$chosen"; then
            kill -HUP "$(cat "$(sed -n 's/^pid \(.*\);/\1/p' "$chosen")")" && last=$now
        fi
    done
}
# Taken before nginx reads anything: what changes from here on is noticed, however late the watching begins.
last=$(state)
watch &
exec nginx -c "$chosen"
