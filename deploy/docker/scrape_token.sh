#!/bin/sh
# Gives Prometheus a viewer's token for /metrics and waits for the server as long as it takes; harmless when repeated.
set -eu
umask 077
folder=/secrets/prometheus
: "${GLORA_URL:=http://server:8080}"
export GLORA_URL

works() {
  [ -s "$folder/token" ] && glora run list --token "$(cat "$folder/token")" >/dev/null 2>&1
}

trap 'exit 143' TERM INT
until works; do
  if token=$(glora api-token create --name prometheus --role viewer --user admin --expires never); then
    printf '%s' "$token" >"$folder/token.new"
    chmod 0444 "$folder/token.new" # nobody but Prometheus has this folder
    mv -f "$folder/token.new" "$folder/token"
  else
    sleep 3
  fi
done
echo "Prometheus has a token that works."
