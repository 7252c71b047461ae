#!/bin/sh
# As the official image's: fragments first, templates filled in from the environment, then the command.
set -e
for fragment in /docker-entrypoint.d/*.sh; do [ -x "$fragment" ] && "$fragment"; done
for template in /etc/nginx/templates/*.template; do
    [ -e "$template" ] || continue
    # shellcheck disable=SC2046 # one word: the list of variables that are set
    defined=$(env | cut -d= -f1 | sed 's/.*/${&}/' | tr '\n' ' ')
    envsubst "$defined" <"$template" >"/etc/nginx/conf.d/$(basename "$template" .template)"
done
exec "$@"
