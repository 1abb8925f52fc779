#!/usr/bin/env bash
# Archive::Tar 2.40, part of Perl 5.36, passes over pax headers, so long names become short ones.
#
# Expected: a name that does not fit the tar header is in the pax record `path` in front of it (POSIX, pax). This is the
# format that Go and Python write for long names, so container layers are full of it. The module names the pax
# specification in its documentation and reads GNU tar's long names.
#
# Seen: an entry of type `x` is thrown away, as something "not meant for extracting". The entry behind it keeps the name
# in its own header, which writers cut to 100 bytes. Two long names in one folder become one: the second file overwrites
# the first. Nothing is reported.
#
# Consequence: scripts in Perl that unpack layers or packages give wrong names for npm's and Python's deep trees. Repack
# with `tar --format=gnu` for them.
set -euo pipefail

version=5.36.0-7+deb12u4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download "perl-modules-5.36=$version"
dpkg -x ./perl-modules-5.36_*.deb root

python3 - <<'PYTHON'
import io, tarfile

for format, name in ((tarfile.PAX_FORMAT, "pax.tar"), (tarfile.GNU_FORMAT, "gnu.tar")):
    with tarfile.open(name, "w", format=format) as archive:
        for end in ("one", "two"):
            entry = tarfile.TarInfo("f" * 120 + end)
            entry.size = 3
            archive.addfile(entry, io.BytesIO(end.encode()))
PYTHON
seen=$(for file in gnu.tar pax.tar; do
    perl -I root/usr/share/perl/5.36.0 -MArchive::Tar -e '
        $INC{"Archive/Tar.pm"} =~ m{^root/} or die "not the pinned module";
        my @names = Archive::Tar->list_archive($ARGV[0]);
        print "$Archive::Tar::VERSION $ARGV[0]: lengths ", join(", ", map { length } @names), "\n"' "$file"
done)

echo "Package:  Archive::Tar in perl-modules-5.36 $version (Debian)"
echo "Expected: lengths 123, 123 from both"
echo "Seen:     the names of the pax archive are cut to 100"
echo "Output:"
echo "$seen"
echo "Source:   POSIX, pax, 'pax Extended Header Keyword/Value Pairs'; Archive::Tar's own 'SEE ALSO' names it"
known='2.40 gnu.tar: lengths 123, 123
2.40 pax.tar: lengths 100, 100'
[ "$seen" = "$known" ] && echo "Holds." || { echo "Changed: see the output." >&2; exit 1; }
