/* A fake libcudart for test_tensorrt.py. "Device" memory is separate host memory. Copies and launches wait in a queue
   until the stream is synchronised, as on a device, so that a result that is read too early is wrong. The log has a
   line for each call. */

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX = 4096 };
static char text[1 << 16];
static size_t used;
static struct { void *address; size_t size; int kind; } blocks[MAX]; /* kind: 1 device, 2 pinned, 3 mapped */
static int block_count;
static struct { int launch; void *target; const void *source; size_t size; int rows, pixels, classes; } queue[MAX];
static int queue_length;
static int integrated, streams;
static char failing[64];

static int note(const char *name, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    used += snprintf(text + used, sizeof text - used, "%s", name);
    used += vsnprintf(text + used, sizeof text - used, format, arguments);
    used += snprintf(text + used, sizeof text - used, "\n");
    va_end(arguments);
    return strcmp(name, failing) == 0 ? 2 : 0; /* 2: out of memory */
}

void fake_reset(int is_integrated, const char *fails) {
    used = 0, text[0] = 0, integrated = is_integrated, queue_length = 0;
    snprintf(failing, sizeof failing, "%s", fails);
}
const char *fake_log(void) { return text; }
int fake_open(void) { return block_count + streams; }

static int find(const void *address, size_t size) {
    for (int i = 0; i < block_count; i++)
        if ((char *)address >= (char *)blocks[i].address &&
            (char *)address + size <= (char *)blocks[i].address + blocks[i].size)
            return i;
    return -1;
}
static int take(void **address, size_t size, int kind) {
    *address = malloc(size);
    memset(*address, 0xA5, size);
    blocks[block_count].address = *address, blocks[block_count].size = size, blocks[block_count++].kind = kind;
    return 0;
}
static int give(void *address, int device) {
    for (int i = 0; i < block_count; i++)
        if (blocks[i].address == address && (blocks[i].kind == 1) == device) {
            free(address);
            blocks[i] = blocks[--block_count];
            return 0;
        }
    return 1;
}

const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "invalid argument"; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 18 ? integrated : attribute == 19;
    return note("cudaDeviceGetAttribute", " %d", attribute);
}
int cudaMalloc(void **address, size_t size) { return note("cudaMalloc", " %zu", size) || take(address, size, 1) ? 2 : 0; }
int cudaHostAlloc(void **address, size_t size, unsigned flags) {
    return note("cudaHostAlloc", " %zu %u", size, flags) || take(address, size, flags & 2 ? 3 : 2) ? 2 : 0;
}
int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    int i = find(host, 1);
    *device = host;
    return note("cudaHostGetDevicePointer", "") || i < 0 || blocks[i].kind != 3;
}
int cudaFree(void *address) { return note("cudaFree", "") || give(address, 1); }
int cudaFreeHost(void *address) { return note("cudaFreeHost", "") || give(address, 0); }
int cudaStreamCreate(void **stream) {
    *stream = (void *)0x7000000000000001; /* more than 32 bits, to detect a truncated pointer */
    if (note("cudaStreamCreate", "")) return 2;
    streams++;
    return 0;
}
int cudaStreamDestroy(void *stream) {
    streams--;
    return note("cudaStreamDestroy", "") || stream != (void *)0x7000000000000001;
}
int cudaMemcpyAsync(void *target, const void *source, size_t size, int direction, void *stream) {
    int to = find(target, size), from = find(source, size);
    if (note("cudaMemcpyAsync", " %zu %d", size, direction)) return 2;
    if (to < 0 || from < 0 || stream != (void *)0x7000000000000001) return 1;
    if (blocks[direction == 1 ? to : from].kind != 1 || blocks[direction == 1 ? from : to].kind != 2) return 1;
    queue[queue_length].launch = 0, queue[queue_length].target = target, queue[queue_length].source = source;
    queue[queue_length++].size = size;
    return 0;
}
/* The engine: logit c is c + 1 times the sum of the pixels. Both buffers must be device or mapped memory. */
int fake_launch(const void *images, void *logits, int rows, int pixels, int classes, void *stream) {
    int in = find(images, (size_t)rows * pixels), out = find(logits, sizeof(float) * rows * classes);
    note("launch", " %d", rows);
    if (in < 0 || out < 0 || blocks[in].kind == 2 || blocks[out].kind == 2) return 1;
    queue[queue_length].launch = 1, queue[queue_length].source = images, queue[queue_length].target = logits;
    queue[queue_length].rows = rows, queue[queue_length].pixels = pixels, queue[queue_length++].classes = classes;
    return stream != (void *)0x7000000000000001;
}
int cudaStreamSynchronize(void *stream) {
    for (int i = 0; i < queue_length; i++) {
        if (!queue[i].launch) {
            memcpy(queue[i].target, queue[i].source, queue[i].size);
            continue;
        }
        const unsigned char *pixel = queue[i].source;
        float *logit = queue[i].target;
        for (int row = 0; row < queue[i].rows; row++) {
            float sum = 0;
            for (int p = 0; p < queue[i].pixels; p++) sum += *pixel++;
            for (int c = 0; c < queue[i].classes; c++) *logit++ = sum * (c + 1);
        }
    }
    queue_length = 0;
    return note("cudaStreamSynchronize", "") || stream != (void *)0x7000000000000001;
}
