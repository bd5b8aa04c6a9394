#!/bin/sh
# Builds dist/claude_api_bridge.pyz: the bridge as one executable file. The same source gives the same bytes,
# whoever builds it and when: order, times and modes are fixed, and nothing is compressed.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
"$python" - "$stage/app.zip" <<'PY'
import pathlib, sys, zipfile

# What `import claude_api_bridge` would do, but that compiles what is in an archive twice: to find it, and to run it.
main = b"""import sys

name = "claude_api_bridge"
module = sys.modules[name] = type(sys)(name)
module.__loader__, module.__file__ = __spec__.loader, __file__[:-len("__main__.py")] + name + ".py"
module.__spec__ = type(__spec__)(name, module.__loader__, origin=module.__file__)
exec(compile(module.__loader__.get_data(module.__file__), module.__file__, "exec"), module.__dict__)
module.run()
"""
parts = {"__main__.py": main, "claude_api_bridge.py": pathlib.Path("claude_api_bridge.py").read_bytes()}
with zipfile.ZipFile(sys.argv[1], "w") as archive:
    for name, data in parts.items():
        info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        info.create_system, info.external_attr = 3, 0o644 << 16
        archive.writestr(info, data)
PY
mkdir -p dist
"$python" -m zipapp "$stage/app.zip" -p '/usr/bin/env python3' -o dist/claude_api_bridge.pyz
# zipapp lets only the owner run it.
chmod 755 dist/claude_api_bridge.pyz
"$python" dist/claude_api_bridge.pyz --version > /dev/null
"$python" dist/claude_api_bridge.pyz start --help > /dev/null
echo "dist/claude_api_bridge.pyz"
