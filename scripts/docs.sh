#!/usr/bin/env bash
# Documentation: builds the site of mkdocs.yml into site/, offline. A link or heading that is not there ends it. Sets up .venv on the
# first run. `scripts/docs.sh serve` shows the site on http://127.0.0.1:8000 and builds it again when a page changes.
extra=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export NO_MKDOCS_2_WARNING=1 # an advertisement
if [ "${1:-build}" = serve ]; then
    exec "$python" -P -m mkdocs serve
fi
exec "$python" -P -m mkdocs --quiet build --strict --clean
