// The C interface that Python loads, the choice of instruction set, and the pool of buffers.
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <string_view>

#define NCK_ISA common
#include "problem.hpp"
#undef NCK_ISA

namespace nckernels {

#if defined(__x86_64__)
namespace avx512 { int32_t run_forward(const Problem&, int64_t*); int32_t run_backward(const Problem&, const Gradients&); }
namespace avx2 { int32_t run_forward(const Problem&, int64_t*); int32_t run_backward(const Problem&, const Gradients&); }
#endif
namespace baseline { int32_t run_forward(const Problem&, int64_t*); int32_t run_backward(const Problem&, const Gradients&); }

struct Kernels {
    const char* name;
    int32_t (*forward)(const Problem&, int64_t*);
    int32_t (*backward)(const Problem&, const Gradients&);
};

static Kernels choose() {
    const char* wanted = std::getenv("NCKERNELS_CPU");
    const std::string_view limit = wanted ? wanted : "avx512";
#if defined(__x86_64__)
    if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        return {"avx512", avx512::run_forward, avx512::run_backward};
    if (limit != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {"avx2", avx2::run_forward, avx2::run_backward};
#endif
    return {"baseline", baseline::run_forward, baseline::run_backward};
}

static const Kernels kernels = choose();
static const pid_t owner = getpid();

namespace scratch {

static std::mutex mutex;
static std::multimap<size_t, void*> free_buffers;
static size_t free_bytes = 0, used_bytes = 0, peak_bytes = 0;
constexpr size_t kept_at_most = size_t(256) << 20;

static size_t rounded(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

void* acquire(size_t bytes) {
    const size_t size = rounded(bytes);
    {
        std::lock_guard<std::mutex> lock(mutex);
        used_bytes += size;
        peak_bytes = used_bytes > peak_bytes ? used_bytes : peak_bytes;
        auto found = free_buffers.find(size);
        if (found != free_buffers.end()) {
            void* p = found->second;
            free_buffers.erase(found);
            free_bytes -= size;
            return p;
        }
    }
    void* p = std::aligned_alloc(4096, size);
    if (!p) throw std::bad_alloc();
    return p;
}

void release(void* p, size_t bytes) {
    const size_t size = rounded(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    used_bytes -= size;
    if (free_bytes + size > kept_at_most) {
        std::free(p);
        return;
    }
    free_buffers.emplace(size, p);
    free_bytes += size;
}

}  // namespace scratch

// OpenMP's threads do not survive fork(): a child runs on its own thread.
template <class F>
static int32_t guarded(Problem p, F&& run) {
    if (getpid() != owner) p.threads = 1;
    const double flops = 6.0 * p.m * p.k * p.d;
    if (flops < 1e6) p.threads = 1;
    try {
        return run(p);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace nckernels

extern "C" {

int32_t nckernels_forward(const nckernels::Problem* p, int64_t* bad) {
    return nckernels::guarded(*p, [&](const nckernels::Problem& q) { return nckernels::kernels.forward(q, bad); });
}

int32_t nckernels_backward(const nckernels::Problem* p, const nckernels::Gradients* g) {
    return nckernels::guarded(*p, [&](const nckernels::Problem& q) { return nckernels::kernels.backward(q, *g); });
}

const char* nckernels_isa() { return nckernels::kernels.name; }
int64_t nckernels_abi() { return (int64_t(sizeof(nckernels::Problem)) << 16) | int64_t(sizeof(nckernels::Gradients)); }
// Highest number of scratch bytes in use since the last call.
int64_t nckernels_peak_scratch() {
    std::lock_guard<std::mutex> lock(nckernels::scratch::mutex);
    const int64_t peak = static_cast<int64_t>(nckernels::scratch::peak_bytes);
    nckernels::scratch::peak_bytes = nckernels::scratch::used_bytes;
    return peak;
}
}
