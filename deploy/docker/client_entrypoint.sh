#!/bin/sh
# A device that joins by itself, once, and works from then on. Arguments: those of `glora client`; before its command
# `run` it joins, for which it needs
#   GLORA_SERVER        HOST or HOST:PORT
#   GLORA_JOIN_TOKEN    or GLORA_JOIN_TOKEN_FILE, which may come later
#   GLORA_DEVICE_NAME   default: the container's host name
#   GLORA_DEVICE_RANK   default: 8
set -eu
refused=3

if [ "${1:-run}" != run ]; then
  exec glora client "$@"
fi
[ $# -eq 0 ] || shift

token() {
  if [ -n "${GLORA_JOIN_TOKEN:-}" ]; then
    printf '%s' "$GLORA_JOIN_TOKEN"
  elif [ -s "${GLORA_JOIN_TOKEN_FILE:-}" ]; then
    cat "$GLORA_JOIN_TOKEN_FILE"
  fi
}

trap 'exit 143' TERM INT
said=
until glora client status >/dev/null 2>&1; do
  if [ -z "${GLORA_SERVER:-}" ] || [ -z "${GLORA_JOIN_TOKEN:-}${GLORA_JOIN_TOKEN_FILE:-}" ]; then
    echo "This device has not joined: set GLORA_SERVER and GLORA_JOIN_TOKEN (or GLORA_JOIN_TOKEN_FILE)." >&2
    exit 2
  fi
  join_token=$(token)
  if [ -n "$join_token" ]; then
    status=0
    glora client join --server "$GLORA_SERVER" --token "$join_token" \
      --name "${GLORA_DEVICE_NAME:-$(hostname)}" --rank "${GLORA_DEVICE_RANK:-8}" || status=$?
    [ "$status" != 0 ] || break
    [ "$status" != "$refused" ] || exit "$refused"
  elif [ -z "$said" ]; then
    said=yes
    echo "Waiting for a join token in $GLORA_JOIN_TOKEN_FILE." >&2
  fi
  sleep 3
done
exec glora client run "$@"
