// Finds the real CUDA libraries at the first call of a stand-in (stand_ins.py). Where there are none, every function returns
// the error code by which its library says so: "no device", "not initialised".
#define _GNU_SOURCE
#include <dlfcn.h>
#include <glob.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// As stand_ins.py lays it out.
struct library {
    const char *name;
    void **slots;
    const char *const *symbols;
};

static void *error_1(void) { return (void *)(intptr_t)1; }      // CUBLAS_STATUS_NOT_INITIALIZED
static void *error_3(void) { return (void *)(intptr_t)3; }      // ncclInternalError
static void *error_11(void) { return (void *)(intptr_t)11; }    // NVRTC_ERROR_INTERNAL_ERROR
static void *error_100(void) { return (void *)(intptr_t)100; }  // CUDA_ERROR_NO_DEVICE
static void *error_101(void) { return (void *)(intptr_t)101; }  // CURAND_STATUS_NOT_INITIALIZED

static struct real {
    const char *name;
    const char *files[2];
    void *(*absent)(void);
    int looked_for;
    void *handle;
} reals[] = {
    {.name = "cuda", .files = {"libcuda.so.1"}, .absent = error_100},
    // Before cublas, which needs it.
    {.name = "cublasLt", .files = {"libcublasLt.so.13", "libcublasLt.so.12"}, .absent = error_1},
    {.name = "cublas", .files = {"libcublas.so.13", "libcublas.so.12"}, .absent = error_1},
    {.name = "curand", .files = {"libcurand.so.10"}, .absent = error_101},
    {.name = "nvrtc", .files = {"libnvrtc.so.13", "libnvrtc.so.12"}, .absent = error_11},
    {.name = "nccl", .files = {"libnccl.so.2"}, .absent = error_3},
};
enum { N_REALS = sizeof reals / sizeof reals[0] };

// Where libraries lie that the loader does not know of. WAVEGEN_CUDA_LIBS, a folder, comes before the loader's; its value "none"
// hides all of CUDA.
static const char *const FOLDERS[] = {
    "/usr/local/cuda/lib64",
    "/usr/local/nvidia/lib64",
    "/usr/local/lib/python3*/*-packages/nvidia/cu13/lib",
    "/usr/lib/python3*/*-packages/nvidia/cu13/lib",
    "/usr/local/lib/python3*/*-packages/nvidia/nccl/lib",
    "/usr/lib/python3*/*-packages/nvidia/nccl/lib",
};

static void *open_in(const char *folder, const char *file) {
    char pattern[4096];
    if (snprintf(pattern, sizeof pattern, "%s/%s", folder, file) >= (int)sizeof pattern) return NULL;
    glob_t found;
    void *handle = NULL;
    if (glob(pattern, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc && !handle; i++) handle = dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_LOCAL);
    globfree(&found);
    return handle;
}

static void *open_real(const struct real *real) {
    const char *chosen = getenv("WAVEGEN_CUDA_LIBS");
    if (chosen && !strcmp(chosen, "none")) return NULL;
    void *handle = NULL;
    for (int i = 0; i < 2 && real->files[i] && !handle; i++) {
        if (chosen && *chosen) handle = open_in(chosen, real->files[i]);
        if (!handle) handle = dlopen(real->files[i], RTLD_NOW | RTLD_LOCAL);
        for (size_t f = 0; f < sizeof FOLDERS / sizeof *FOLDERS && !handle; f++) handle = open_in(FOLDERS[f], real->files[i]);
    }
    return handle;
}

static const struct real *find(const char *name) {
    for (int i = 0; i < N_REALS; i++) {
        const int is_it = !strcmp(reals[i].name, name);
        const int comes_before = !strcmp(reals[i].name, "cublasLt") && !strcmp(name, "cublas");
        if ((is_it || comes_before) && !reals[i].looked_for) {
            reals[i].looked_for = 1;
            reals[i].handle = open_real(&reals[i]);
        }
        if (is_it) return &reals[i];
    }
    abort();  // stand_ins.py names a library that is not above
}

__attribute__((visibility("hidden"))) void *stand_in_resolve(uint64_t function, const struct library *library) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    const struct real *real = find(library->name);
    void *address = real->handle ? dlsym(real->handle, library->symbols[function]) : NULL;
    if (real->handle && !address) fprintf(stderr, "warning: the %s library lacks %s\n", library->name, library->symbols[function]);
    if (!address) address = (void *)real->absent;
    __atomic_store_n(&library->slots[function], address, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return address;
}
