#!/usr/bin/env bash
# Writes proto/glora/v1/*_pb2*.py(i) from the .proto files, or with --check fails when they differ.
# The generator is pinned: stubs refuse a protobuf runtime older than their generator.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${GLORA_STUBS_VENV:-.venv/stubs}"
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q "grpcio-tools==1.76.0" "mypy-protobuf==3.7.0" "setuptools<81"
fi
out=proto
if [ "${1:-}" = "--check" ]; then out="$(mktemp -d)"; trap 'rm -rf "$out"' EXIT; fi
PATH="$PWD/$venv/bin:$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I proto \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" proto/glora/v1/*.proto
[ "$out" = proto ] || diff -r -x '*.proto' -x '__init__.py' -x '__pycache__' -x py.typed proto/glora/v1 "$out/glora/v1"
