# Steps that layers share. A script `build` runs with ROOT, the root to change, DOWNLOADS, a folder that is kept, and its
# own folder as the working directory; `tidy` runs behind it. Nothing of the time or the machine of the build stays.

export DEBIAN_FRONTEND=noninteractive LC_ALL=C SOURCE_DATE_EPOCH=1793491200 TZ=UTC
mkdir -p "$DOWNLOADS/debs/partial" "$DOWNLOADS/wheels"
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

# base: the smallest Debian that has apt, from the mirror of this machine.
base() {
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v -e security -e '^$' | head -n1)
    debootstrap --variant=minbase --cache-dir="$DOWNLOADS/debs" "$suite" "$ROOT" "$mirror" >&2
    umount "$ROOT/proc" 2>/dev/null || true # some versions leave it there
    # No service starts while packages are installed, as in the images of others.
    printf '#!/bin/sh\nexit 101\n' > "$ROOT/usr/sbin/policy-rc.d"
    chmod 755 "$ROOT/usr/sbin/policy-rc.d"
}

# from_mirror ARGUMENT...: apt-get with the lists and keys of this machine, for packages in ROOT.
from_mirror() {
    apt-get -q -y --no-install-recommends -o Dir::State::status="$ROOT/var/lib/dpkg/status" \
        -o Dir::Cache::archives="$DOWNLOADS/debs" -o Dpkg::Options::=--root="$ROOT" -o Dpkg::Use-Pty=0 \
        -o Dir::Log="$DOWNLOADS" "$@" >&2
}

# packages NAME...: installs Debian packages.
packages() {
    mount -t proc proc "$ROOT/proc"
    from_mirror install "$@"
    umount "$ROOT/proc"
}

# files_of NAME...: unpacks Debian packages, without those that they need and without their scripts.
files_of() {
    for package; do
        (cd "$DOWNLOADS" && { ls "${package}"_*.deb >/dev/null 2>&1 || apt-get -q download "$package" >&2; })
        dpkg-deb --fsys-tarfile "$DOWNLOADS/$package"_*.deb | tar -C "$ROOT" -xf -
    done
}

# wheels REQUIREMENT...: installs packages of PyPI for the Python of ROOT, compiled as pip does.
wheels() {
    version=$(chroot "$ROOT" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    to=/usr/local/lib/python$version/dist-packages
    python3 -m pip install --quiet --no-compile --only-binary=:all: --implementation cp --python-version "$version" \
        --platform "manylinux2014_$(uname -m)" --platform "manylinux_2_27_$(uname -m)" --platform "manylinux_2_28_$(uname -m)" \
        --cache-dir "$DOWNLOADS/wheels" --root-user-action ignore --target "$ROOT$to" "$@" >&2
    # Checked by contents never: a time in it would differ from build to build.
    chroot "$ROOT" python3 -m compileall -q --invalidation-mode unchecked-hash "$to" >&2 || true
}

# tidy: removes what a build leaves beside what it installs.
tidy() {
    for dir in var/cache/apt var/lib/apt/lists var/log tmp var/tmp root/.cache run; do
        [ ! -d "$ROOT/$dir" ] || find "$ROOT/$dir" ! -type d -delete
    done
    rm -f "$ROOT"/var/lib/dpkg/*-old "$ROOT"/var/cache/debconf/*-old "$ROOT"/etc/*- "$ROOT/var/cache/ldconfig/aux-cache" \
        "$ROOT"/etc/resolv.conf "$ROOT"/etc/hostname
    # The day of the last change of a password is the day of the build.
    if [ -e "$ROOT/etc/shadow" ] && grep -Eqv '^[^:]*:[^:]*:20000:' "$ROOT/etc/shadow"; then
        sed -i -E 's/^([^:]*:[^:]*:)[0-9]*:/\120000:/' "$ROOT/etc/shadow"
    fi
}
