#!/bin/sh
# Makes the composition's passwords at the first start, and puts each where only its service can read it.
# A password of one's own: GLORA_POSTGRES_PASSWORD, GLORA_ADMIN_PASSWORD, GLORA_GRAFANA_PASSWORD.
set -eu
umask 077
SERVER=10001 # the users of the images
GRAFANA=472

# keep FILE GIVEN: GIVEN where there is one, else what FILE holds, else something new
keep() {
  if [ -n "$2" ]; then
    printf '%s' "$2" >"$1.new"
  elif [ -s "$1" ]; then
    return
  else
    head -c 24 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n' >"$1.new"
  fi
  mv -f "$1.new" "$1"
}

cd /secrets
chmod 0755 postgres server grafana prometheus
chown "$SERVER" prometheus # it writes the token for /metrics there

keep postgres/password "${GLORA_POSTGRES_PASSWORD:-}"
chmod 0444 postgres/password # which number PostgreSQL's user has depends on its image

# libpq reads a file of passwords only when nobody else can.
printf '*:*:*:glora:%s\n' "$(sed 's/[\\:]/\\&/g' postgres/password)" >server/pgpass.new
mv -f server/pgpass.new server/pgpass
keep server/admin_password "${GLORA_ADMIN_PASSWORD:-}"
chown "$SERVER" server/pgpass server/admin_password
chmod 0400 server/pgpass server/admin_password

keep grafana/password "${GLORA_GRAFANA_PASSWORD:-}"
chown "$GRAFANA" grafana/password
chmod 0400 grafana/password
echo "The passwords are there."
