#!/usr/bin/env python3
"""Layers that test the corners of unpacking. Usage: odd_layers.py DIR  (DIR has the output of gen_layers.py)"""
import gzip, os, subprocess, sys, tarfile, io, tempfile

out = sys.argv[1]
MT = 1600000000


def compress(name):
    path = os.path.join(out, name)
    with open(path + '.tar', 'rb') as source, open(path + '.tar.gz', 'wb') as target:
        with gzip.GzipFile(filename='', mode='wb', fileobj=target, compresslevel=6, mtime=0) as stream:
            stream.write(source.read())


def without(name, target, dropped):
    """Copies NAME.tar without one member, headers and data untouched."""
    data = open(os.path.join(out, name + '.tar'), 'rb').read()
    with tarfile.open(os.path.join(out, name + '.tar')) as tar:
        member = tar.getmember(dropped)
    with open(os.path.join(out, target + '.tar'), 'wb') as copy:
        copy.write(data[:member.offset] + data[member.offset_data:])
    compress(target)


class Layer:
    def __init__(self, name):
        self.name = name
        self.tar = tarfile.open(os.path.join(out, name + '.tar'), 'w', format=tarfile.PAX_FORMAT)

    def add(self, name, type=tarfile.REGTYPE, data=b'', mode=0o644, uid=0, gid=0, mtime=MT, link='', device=(0, 0), **xattrs):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.mtime, info.linkname = type, mode, uid, gid, mtime, link
        info.devmajor, info.devminor = device
        info.pax_headers = {'SCHILY.xattr.' + key.replace('__', '.'): value for key, value in xattrs.items()}
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def dir(self, name, **more):
        self.add(name, tarfile.DIRTYPE, mode=more.pop('mode', 0o755), **more)

    def close(self):
        self.tar.close()
        compress(self.name)


# What the lower layer has.
lower = Layer('odd-lower')
for d in ['real', 'real/deep', 'opaque', 'opaque/sub', 'gone', 'back', 'kind', 'attrs', 'same']:
    lower.dir(d)
lower.add('real/file', data=b'lower real')
lower.add('real/deep/file', data=b'lower deep')
lower.add('to-real', tarfile.SYMTYPE, link='real')
lower.add('to-root', tarfile.SYMTYPE, link='/')
lower.add('escape', tarfile.SYMTYPE, link='../../../..')
lower.add('dangling', tarfile.SYMTYPE, link='nowhere/at/all')
for n in ['opaque/a', 'opaque/sub/b', 'gone/c', 'back/d', 'kind/file', 'kind/other']:
    lower.add(n, data=n.encode() * 100)
lower.add('kind/link', tarfile.SYMTYPE, link='file')
lower.dir('kind/dir')
lower.add('kind/dir/inside', data=b'inside')
lower.dir('attrs/dir', mode=0o700, uid=3, gid=4, user__one='1', user__two='2')
lower.add('attrs/dir/kept', data=b'kept')
lower.add('attrs/file', data=b'file', user__one='1')
lower.add('time/zero', data=b'', mtime=0)
lower.add('time/before', data=b'', mtime=-1000000.75)
lower.add('time/after', data=b'', mtime=5000000000.123456789)
lower.add('time/fine', data=b'', mtime=1234567890.987654321)
lower.add('many-ids', data=b'x', uid=3000000, gid=4000000000)
lower.add('same/one', data=b'shared', mode=0o600, uid=1)
lower.add('same/two', tarfile.LNKTYPE, link='same/one', mode=0o640, uid=2, gid=9, mtime=MT + 5)
lower.add('same/three', tarfile.LNKTYPE, link='./same/../same/one', mode=0o644, uid=2, gid=9, mtime=MT + 6)
lower.add('dev-null', tarfile.CHRTYPE, mode=0o666, device=(1, 3))
lower.add('posix-acl', data=b'acl')
lower.close()

# Through links, whiteouts, replacements.
middle = Layer('odd-middle')
middle.add('to-real/through', data=b'a lower symlink on the way becomes a directory')
middle.add('own-link', tarfile.SYMTYPE, link='own-dir')
middle.dir('own-dir', mode=0o711)
middle.add('own-link/through', data=b'a symlink of the same layer is followed')
middle.add('own-escape', tarfile.SYMTYPE, link='/../../own-dir')
middle.add('own-escape/inside', data=b'never outside')
middle.dir('opaque', mode=0o750)
middle.add('opaque/before', data=b'written before the marker')
middle.add('opaque/.wh..wh..opq')
middle.add('opaque/after', data=b'written after the marker')
middle.add('.wh.gone')
middle.add('back/.wh.d')
middle.add('kind/.wh.other')
middle.dir('kind/file', mode=0o701)
middle.add('kind/file/now-a-directory', data=b'yes')
middle.add('kind/dir', data=b'now a file')
middle.add('kind/link', data=b'now a file, the old target untouched')
middle.dir('attrs/dir', mode=0o1775, uid=30, user__three='3')
middle.add('attrs/file', data=b'file again')
middle.add('real/deep/new', data=b'a parent of the lower layer is copied up')
middle.dir('../outside', mode=0o755)
middle.add('/absolute/path', data=b'absolute')
middle.add('./a/.././b//c', data=b'unclean')
middle.close()

# The third layer undoes some of it.
upper = Layer('odd-upper')
upper.dir('gone')
upper.add('gone/again', data=b'again')
upper.add('back/d', data=b'came back')
upper.add('opaque/third', data=b'third')
upper.add('own-link', data=b'no link any more')
upper.add('.wh.dangling')
upper.dir('attrs/dir', mode=0o755)
upper.add('kind/.wh.file')
upper.add('dup', data=b'first', mode=0o600)
upper.add('dup', data=b'second', mode=0o644)
upper.add('dup-dir', data=b'first a file')
upper.dir('dup-dir')
upper.add('dup-dir/child', data=b'then a directory')
upper.close()

without('upper', 'upper-linkless', 'links/hard-lower')
without('upper-gnu', 'upper-gnu-linkless', 'links/hard-lower')
for name in ['upper-simple', 'upper-nex', 'through-symlink']:
    compress(name)

# Sparse files, by GNU tar itself.
with tempfile.TemporaryDirectory() as work:
    os.mkdir(work + '/sparse')
    shapes = {
        'hole-first': [(1 << 20, b'end')],
        'hole-last': [(0, b'start'), (3 << 20, b'')],
        'holes': [(i * 65536, bytes([i + 1]) * 4096) for i in range(100)],
        'uneven': [(5000, b'x' * 5000), (1 << 20, b'y' * 12345), ((2 << 20) + 777, b'z' * 100)],
        'all-hole': [(1 << 20, b'')],
        'large': [(300 << 20, b'far away')],
    }
    for name, pieces in shapes.items():
        with open(f'{work}/sparse/{name}', 'wb') as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
                file.truncate(max(offset + len(data), file.tell()))
        os.utime(f'{work}/sparse/{name}', (MT, MT))
    os.utime(work + '/sparse', (MT, MT))
    for name, options in [('gnu', ['--format=gnu']), ('pax00', ['--format=pax', '--sparse-version=0.0']),
                          ('pax01', ['--format=pax', '--sparse-version=0.1']), ('pax10', ['--format=pax', '--sparse-version=1.0'])]:
        subprocess.run(['tar', '-C', work, '--sparse', '--sort=name', '--numeric-owner', *options,
                        '--transform', f's,^sparse,sparse-{name},', '-cf', f'{out}/sparse-{name}.tar', 'sparse'], check=True)
        compress(f'sparse-{name}')
