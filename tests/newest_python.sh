#!/bin/bash
# Unpack the newest Python of Debian unstable into a folder, and print the path of its program:
#
#   python=$(tests/newest_python.sh FOLDER [3.14])
#
# Nothing is installed. The packages, their C library too, come from the Debian mirror that /etc/apt
# names, by an apt root inside the folder; apt checks their signatures. The program can make virtual
# environments with pip, and works only as long as the folder stays where it is.
# If that cannot be done, the last line of stderr is the reason, and the status is 1.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: newest_python.sh FOLDER [VERSION]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
log=$folder/log
: > "$log"

give_up() {
    cat "$log" >&2
    echo "$1" >&2
    exit 1
}

for tool in apt-get apt-cache dpkg dpkg-deb; do
    command -v "$tool" > /dev/null || give_up "there is no $tool here"
done
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || give_up "there is no $keyring"

# Both forms of apt's sources: lines that begin with "deb", and "URIs:" in paragraphs.
mirrors=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2> /dev/null \
    | grep -E '^(deb |URIs:)' | grep -oE '[^ ]+/debian(\.list)?/?( |$)' | sort -u) || true
[ -n "$mirrors" ] || give_up "/etc/apt names no mirror of Debian"

# --- an apt root of its own, for which no package is installed yet ---
mkdir -p "$folder"/apt/{lists/partial,none} "$folder/cache/archives/partial" "$folder/system"
: > "$folder/apt/status"
own=(
    -o Dir::Etc::SourceList="$folder/apt/sources.list"
    -o Dir::Etc::SourceParts="$folder/apt/none"
    -o Dir::Etc::Preferences="$folder/apt/none/preferences"
    -o Dir::Etc::PreferencesParts="$folder/apt/none"
    -o Dir::State="$folder/apt"
    -o Dir::State::status="$folder/apt/status"
    -o Dir::Cache="$folder/cache"
    # A mirror that is no longer updated serves a Release file past its date.
    -o Acquire::Check-Valid-Until=false
    -o Acquire::Languages=none
    -o Acquire::http::Timeout=30
    -o Acquire::https::Timeout=30
    # apt's own user cannot write into a folder that only its owner may enter.
    -o APT::Sandbox::User=root
)
versions=""
for mirror in $mirrors; do
    options="arch=$(dpkg --print-architecture) signed-by=$keyring"
    echo "deb [$options] $mirror sid main" > "$folder/apt/sources.list"
    apt-get "${own[@]}" update >> "$log" 2>&1 || continue
    versions=$(apt-cache "${own[@]}" pkgnames python3. 2>> "$log" \
        | sed -nE 's/^python(3\.[0-9]+)$/\1/p' | sort -rV)
    [ -z "$versions" ] || break
done
[ -n "$versions" ] || give_up "no mirror of Debian in /etc/apt gives the packages of unstable"

# --- download and unpack ---
name=""
for version in ${2:-$versions}; do
    if apt-get "${own[@]}" install --download-only --no-install-recommends -y \
        "python$version" "python$version-venv" patchelf >> "$log" 2>&1; then
        name=python$version
        break
    fi
    # In unstable, a package may wait for another one.
    rm -f "$folder"/cache/archives/*.deb
done
[ -n "$name" ] || give_up "apt can download no Python with all it needs"
for package in "$folder"/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$folder/system" >> "$log" 2>&1 || give_up "$package cannot be unpacked"
done

# --- make the program use the loader and the libraries that came with it ---
root=$folder/system/usr
python=$root/bin/$name
loader=$(compgen -G "$root/lib*/ld*.so.*" | head -n 1) || give_up "libc6 has no loader"
libraries=$(dirname "$(find "$root/lib" -name libc.so.6)")
patch() {
    "$loader" --library-path "$libraries" "$root/bin/patchelf" "$@" "$python" >> "$log" 2>&1 \
        || give_up "patchelf cannot change $name"
}
# In this order: patchelf 0.18 breaks a program whose loader it changes first.
patch --force-rpath --set-rpath "$libraries"
patch --set-interpreter "$loader"
# ensurepip reads the folder of pip's wheel from the settings of the build.
wheels=/usr/share/python-wheels
{ grep -rlIZ "$wheels" "$root/lib/$name" || true; } \
    | xargs -0r sed -i "s|$wheels|$folder/system$wheels|"
"$python" -c "import bz2, ctypes, lzma, sqlite3, ssl, venv, zlib" >> "$log" 2>&1 \
    || give_up "$name does not start here"
echo "$python"
