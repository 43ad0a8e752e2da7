/* What a C engine does with a full payload, in one thread: read, hash, decode with the system's library, write, fsync, drop the cache, read
 * back and hash. It believes everything it reads: it is a stopwatch.
 *
 * reference PAYLOAD PLAN IMAGE
 *
 * PLAN has a line for each operation: kind (0 raw, 1 bzip2, 2 xz, 3 zstd, 4 zeros), offset and length of its data in PAYLOAD, offset and
 * length of what it writes.
 */
#define _GNU_SOURCE
#include <bzlib.h>
#include <fcntl.h>
#include <lzma.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zstd.h>

static void die(const char *what) {
	perror(what);
	exit(1);
}

static void *room(void *p, size_t *have, size_t want) {
	if (*have >= want)
		return p;
	free(p);
	*have = want;
	if (!(p = malloc(want)))
		die("malloc");
	return p;
}

int main(int argc, char **argv) {
	if (argc != 4) {
		fprintf(stderr, "usage: reference PAYLOAD PLAN IMAGE\n");
		return 2;
	}
	int in = open(argv[1], O_RDONLY), out = open(argv[3], O_RDWR | O_CREAT | O_TRUNC, 0600);
	FILE *plan = fopen(argv[2], "r");
	if (in < 0 || out < 0 || !plan)
		die("open");
	EVP_MD_CTX *file = EVP_MD_CTX_new(), *blob = EVP_MD_CTX_new();
	EVP_DigestInit_ex(file, EVP_sha256(), NULL);
	ZSTD_DCtx *zstd = ZSTD_createDCtx();
	unsigned char digest[32];
	char *src = NULL, *dst = NULL;
	size_t have_src = 0, have_dst = 0;
	long kind, off, len, to, size, total = 0;
	while (fscanf(plan, "%ld %ld %ld %ld %ld", &kind, &off, &len, &to, &size) == 5) {
		src = room(src, &have_src, len + 1);
		dst = room(dst, &have_dst, size);
		if (pread(in, src, len, off) != len)
			die("read");
		EVP_DigestUpdate(file, src, len);
		EVP_DigestInit_ex(blob, EVP_sha256(), NULL);
		EVP_DigestUpdate(blob, src, len);
		EVP_DigestFinal_ex(blob, digest, NULL);
		char *data = dst;
		switch (kind) {
		case 0:
			data = src;
			break;
		case 1: {
			unsigned n = size;
			if (BZ2_bzBuffToBuffDecompress(dst, &n, src, len, 0, 0) != BZ_OK || n != size)
				die("bzip2");
			break;
		}
		case 2: {
			uint64_t limit = UINT64_MAX;
			size_t i = 0, o = 0;
			if (lzma_stream_buffer_decode(&limit, 0, NULL, (uint8_t *)src, &i, len, (uint8_t *)dst, &o, size) != LZMA_OK || o != (size_t)size)
				die("xz");
			break;
		}
		case 3:
			if (ZSTD_decompressDCtx(zstd, dst, size, src, len) != (size_t)size)
				die("zstd");
			break;
		default:
			memset(dst, 0, size);
		}
		if (pwrite(out, data, size, to) != size)
			die("write");
		if (to + size > total)
			total = to + size;
	}
	if (fsync(out) || posix_fadvise(out, 0, 0, POSIX_FADV_DONTNEED))
		die("fsync");
	dst = room(dst, &have_dst, 1 << 20);
	EVP_DigestInit_ex(blob, EVP_sha256(), NULL);
	for (long at = 0; at < total;) {
		ssize_t n = pread(out, dst, total - at < 1 << 20 ? total - at : 1 << 20, at);
		if (n <= 0)
			die("read back");
		EVP_DigestUpdate(blob, dst, n);
		at += n;
	}
	EVP_DigestFinal_ex(blob, digest, NULL);
	for (int i = 0; i < 32; i++)
		printf("%02x", digest[i]);
	printf("\n");
	return 0;
}
