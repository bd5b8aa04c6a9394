#!/usr/bin/env bash
# The more free pages a SQLite file has, the more each page costs that incremental_vacuum returns.
#
# Expected: PRAGMA incremental_vacuum(N) gives N pages back to the file system for about the same
#   work each time, so that much can be deleted first and the space returned in small steps later.
# Happens: the last page of the file is mostly free itself, and to take it off the list of free
#   pages SQLite reads that list from its beginning. With 50,000 free pages a returned page costs
#   over 3 times the page reads that it costs with 1,000, and this grows on, in step with the list:
#   deleting first and vacuuming afterwards needs quadratic time. Whoever returns pages between
#   the deletions keeps the list short.
# Versions: apsw 3.54.1.0 (PyPI), which brings SQLite 3.54.1. Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv python
python/bin/pip install --quiet --disable-pip-version-check apsw==3.54.1.0
cat >measure.py <<'PY'
import apsw

def reads_per_page(free):
    db = apsw.Connection("%d.db" % free)
    for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=OFF",
                   "cache_size=-400000"):
        db.execute("PRAGMA " + pragma).fetchall()
    with db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, data)")
        db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
                   " INSERT INTO t SELECT i, zeroblob(3000) FROM n", (2 * free,))
    with db:
        db.execute("DELETE FROM t WHERE id % 2")
    count = lambda: db.execute("PRAGMA freelist_count").fetchall()[0][0]
    kinds = (apsw.SQLITE_DBSTATUS_CACHE_HIT, apsw.SQLITE_DBSTATUS_CACHE_MISS)
    reads = lambda: sum(db.status(kind)[0] for kind in kinds)
    pages, start = count(), reads()
    for _ in range(20):
        db.execute("PRAGMA incremental_vacuum(1)").fetchall()
    total = reads() - start
    return total / (pages - count())

results = {free: reads_per_page(free) for free in (1_000, 10_000, 50_000)}
for free, reads in results.items():
    print("%6d free pages: %5.1f page reads for each returned page" % (free, reads))
assert results[50_000] > 3 * results[1_000], "it does not grow any more"
PY
python/bin/python measure.py
