"""Exit with 0 when the server in this container is ready to work, else say why not."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request


def _main() -> None:
    scheme = "http" if os.environ.get("GLORA__HTTP__TLS", "off") == "off" else "https"
    url = f"{scheme}://127.0.0.1:{os.environ.get('GLORA__HTTP__PORT', '8080')}/readyz"
    # On loopback, and nothing secret is sent: whose certificate it is does not matter.
    context = ssl._create_unverified_context() if scheme == "https" else None  # noqa: S323
    try:
        urllib.request.urlopen(url, timeout=4, context=context)  # noqa: S310
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code} {error.read().decode(errors='replace')[:400]}")
    except OSError as error:
        sys.exit(f"{url} does not answer: {error}")


if __name__ == "__main__":
    _main()
