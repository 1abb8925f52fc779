#!/usr/bin/env python3
"""Small beginnings for the fuzzer. Usage: seeds.py DIR, which gets a folder for each target.

seeds/layer.tar.gz is what `turbobd convert --vsize 1 --span 64` made of a layer of eight files of text.
"""
import gzip, io, os, struct, sys, tarfile, zlib

REG, DIR, SYM, LNK, CHR = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE


def seed(target, name, data):
    folder = os.path.join(sys.argv[1], target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), 'wb') as file:
        file.write(data)


def tar(*entries, format=tarfile.PAX_FORMAT):
    """A tar without its end."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=format) as archive:
        for name, type, data, more in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = type, len(data), 1600000000
            for key, value in more.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
        return out.getvalue()[:archive.offset]


def pax(**records):
    return {'pax_headers': {key.replace('__', '.'): value for key, value in records.items()}}


def deflate(data, level, strategy=0):
    stream = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    return stream.compress(data) + stream.flush()


# The first byte of `tar` is the size of the pieces, that of `apply` the blocks of the lower layer.
lower = tar(('d/', DIR, b'', {}), ('d/f', REG, b'hello' * 100, pax(SCHILY__xattr__user__a='1', mtime='1.5')),
            ('s', SYM, b'', {'linkname': 'd'}), ('h', LNK, b'', {'linkname': 'd/f'}))
sparse = tar(('sparse', REG, b'A' * 600 + b'B' * 7,
              pax(GNU__sparse__size='5000', GNU__sparse__numblocks='2', GNU__sparse__map='100,600,3000,7')))
upper = tar(('d/.wh.f', REG, b'', {}), ('s/x', REG, b'y', {}), ('s', REG, b'z', {}), ('h', LNK, b'', {'linkname': 'd/f'}))
lines = tar(('GNUSparseFile.0/q', REG, b'1\n5\n10\n'.ljust(512, b'\0') + b'0123456789',
             pax(GNU__sparse__major='1', GNU__sparse__minor='0', GNU__sparse__name='q', GNU__sparse__realsize='99')))
gnu = tar(('n' * 120, REG, b'x', {}), ('c', CHR, b'', {'devmajor': 1, 'devminor': 3}), format=tarfile.GNU_FORMAT)
old = bytearray(tar(('old', b'S', b'abc', {}), format=tarfile.GNU_FORMAT))
old[386:410], old[483:495] = b'%011o\0%011o\0' % (700, 3), b'%011o\0' % 2000
for name, blocks in [('lower', lower), ('upper', upper), ('sparse', sparse), ('lines', lines), ('gnu', gnu), ('old', bytes(old))]:
    seed('tar', name, b'\x40' + blocks)
    seed('apply', name, b'\0' + blocks)
seed('apply', 'two-layers', bytes([len(lower) // 512]) + lower + upper + sparse)

# Two bytes in front of `gzip_scan`: as gzip or as bare deflate, and the size of the pieces.
text = b' '.join(b'%x %s' % (i * i * 7919, [b'alpha', b'beta', b'gamma'][i % 3]) for i in range(120))
seed('gzip_scan', 'gzip', b'\0\x10' + gzip.compress(text, mtime=0))
for name, data in [('dynamic', deflate(text, 9)), ('fixed', deflate(text[:100], 9, zlib.Z_FIXED)),
                   ('huffman', deflate(text[:300], 9, zlib.Z_HUFFMAN_ONLY)), ('stored', deflate(text[:40], 0)),
                   ('runs', deflate(b'a' * 200000 + b'abc' * 70000, 6))]:
    seed('gzip_scan', name, b'\1\x10' + data)
stream, far = zlib.compressobj(6, zlib.DEFLATED, -15), b''
for i in range(6):
    far += stream.compress(text[:400] + bytes(60000)) + stream.flush([zlib.Z_FULL_FLUSH, zlib.Z_BLOCK][i % 2])
seed('gzip_scan', 'far', b'\3\x10' + far + stream.flush())

# Our own writers. Two bytes in front of `gzip_index`: the length of the gzip.meta.
with gzip.open(os.path.join(os.path.dirname(__file__), 'seeds/layer.tar.gz')) as file:
    archive = file.read()
with tarfile.open(fileobj=io.BytesIO(archive)) as members:
    fs_meta, meta, sidecar = (members.extractfile(name).read() for name in ['ext4.fs.meta', 'gzip.meta', 'turbobd.segments'])
seed('archive', 'layer', archive)
seed('zfile', 'fs_meta', fs_meta)
seed('gzip_index', 'both', struct.pack('<H', len(meta)) + meta + sidecar[:-4])
alone = bytearray(sidecar[:-4])
alone[10] &= 0xfe
seed('gzip_index', 'sidecar', b'\0\0' + alone)
# Of version 2: two segments of a zstd layer, the second goes on from the first.
seed('gzip_index', 'segments', b'\0\0TBDSEGS\0' + struct.pack('<HBBI', 2, 2, 0, 2) + bytes(32)
     + struct.pack('<QQQ', 30, 200, 1 << 20) + b'\0\3' + b'\x0a\x0b' + b'\x64\x64' + b'\0\1' + bytes(2 * 36))

# A byte in front of `zstd_scan`: the size of the pieces.
def zstd_frame(*blocks):
    """A frame without a checksum; each block raw (bytes) or repeated (a byte, how often)."""
    frame = b'\x28\xb5\x2f\xfd\0\x58'
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        kind, size, content = (0, len(block), block) if isinstance(block, bytes) else (1, block[1], block[0])
        frame += struct.pack('<I', last | kind << 1 | size << 3)[:3] + content
    return frame
skipped = b'\x5a\x2a\x4d\x18' + struct.pack('<I', 3) + b'abc'
seed('zstd_scan', 'small', b'\x10' + zstd_frame(b'hello', (b'x', 90000)) + skipped + zstd_frame(b'world'))
seed('zstd_scan', 'long', b'\x03' + zstd_frame(*[(b'y', 1 << 17)] * 40, b'end'))


def entry(lba, count, place, zeroed=0, file=0):
    """One of an LSMT index: disk sector (50 bits) and length (14), place in the file (55), zeroed (1), file (8)."""
    return struct.pack('<QQ', lba | count << 50, place | zeroed << 55 | file << 56)


# Two bytes in front of `lsmt`: as entries or as a file, of which kind; and the entries of the lower layer.
entries = entry(0, 8, 8) + entry(100, 50, 16) + entry(4, 100, 10) + entry(110, 4, 0, 1) + entry(120, 9, 7, 0, 1)
seed('lsmt', 'plain', b'\1\2' + entries)
seed('lsmt', 'warp', b'\3\2' + entries)

digest = 'sha256:' + 'ab' * 32
seed('reference', 'names', b'registry.example:5000/some/name:v1.0@' + digest.encode())
seed('reference', 'layout', b'oci:some/dir:tag')
descriptor = '{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"%s","size":5,"annotations":' \
    '{"containerd.io/snapshot/overlaybd/turbo-oci/target-digest":"%s"}}' % (digest, digest)
image = descriptor.replace('"size"', '"platform":{"os":"linux","architecture":"amd64"},"size"')
seed('manifest', 'manifest', ('{"schemaVersion":2,"config":%s,"layers":[%s]}' % (descriptor, descriptor)).encode())
seed('manifest', 'index', ('{"schemaVersion":2,"manifests":[%s]}' % image).encode())
seed('manifest', 'config', ('{"os":"linux", "rootfs": {"type":"layers","diff_ids":["%s"]}}' % digest).encode())
seed('config', 'upstream', b'{"repoBlobUrl":"u","lowers":[{"dir":"d","digest":"sha256:1","size":5,"targetFile":"t",'
     b'"gzipIndex":"g"}],"upper":{"index":"i"},"resultFile":"r"}')

# One byte in front of `trace`: whose format. Ours without its checksum, which the target appends.
head = b'turbotrc' + struct.pack('<HHIII', 1, 0, 1, 1, 2) + bytes(range(32))
ours = head + b'\0\x80\x80\x80\x02\x80\x80\x40\0\x02' + b'\0\0\x80\x80\x40\x05\x01'
seed('trace', 'ours', b'\xfe' + ours)
seed('trace', 'twice', b'\x80' + ours + ours)
records = struct.pack('<cxxxIQq', b'R', 0, 4096, 512) + struct.pack('<cxxxIQq', b'W', 1, 1, 1)
seed('trace', 'upstream', b'\1' + struct.pack('<IxxxxQIxxxx', 0xC2EF1820, len(records), 0) + records)

# `ext4` takes a sparse disk, of 8 MiB here: block and length in 16 bits, then the block. mke2fs fills it without a mount.
import shutil, subprocess, tempfile
if mke2fs := shutil.which('mke2fs', path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin'):
    with tempfile.TemporaryDirectory() as work:
        content, disk = os.path.join(work, 'content'), os.path.join(work, 'disk')
        os.makedirs(os.path.join(content, 'd'))
        with open(os.path.join(content, 'file'), 'wb') as file:
            file.write(b'data')
            os.setxattr(file.fileno(), 'user.a', b'v' * 300)
        with open(os.path.join(content, 'pieces'), 'wb') as file:
            for piece in range(6):
                file.seek(piece * 8192)
                file.write(b'p')
        os.link(os.path.join(content, 'file'), os.path.join(content, 'd', 'hard'))
        os.symlink('short', os.path.join(content, 'fast')); os.symlink('s' * 100, os.path.join(content, 'slow'))
        for name, features in [('plain', '^has_journal,^metadata_csum,uninit_bg'), ('sums', '^has_journal,metadata_csum,64bit'),
                               ('pointers', '^has_journal,^extent,^64bit,^flex_bg,^metadata_csum'),
                               ('bare', '^has_journal,^metadata_csum,^uninit_bg,^resize_inode,^dir_index,meta_bg')]:
            subprocess.run(['truncate', '-s', '0', disk], check=True)
            subprocess.run(['truncate', '-s', '8M', disk], check=True)
            subprocess.run([mke2fs, '-q', '-F', '-t', 'ext4', '-b', '4096', '-N', '32', '-O', features, '-d', content, disk], check=True)
            blocks = b''
            with open(disk, 'rb') as file:
                for number in range(2048):
                    block = file.read(4096).rstrip(b'\0')
                    if block:
                        blocks += struct.pack('<HH', number, len(block)) + block
            seed('ext4', name, blocks)
