// What Python hands over (native.py mirrors these structures with ctypes) and the plan made of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace nckernels {

enum Exclude : int32_t { kNone = 0, kTarget = 1, kSelf = 2, kSameLabel = 3 };

// Plain C structure: pointers may be null where a comment says so. Matrices have rows of d contiguous
// numbers at a distance of `*_stride`; everything is of type T but targets (int64).
struct Problem {
    int64_t m, k, d, z_stride, w_stride;
    const void *z, *w;
    const int64_t* target;
    const void *sample_bias, *class_bias;  // (m), (k) or null
    int64_t ignore_index, workspace;       // bytes
    double beta;
    int32_t by_class, by_instance, exclude, present_only, threads, is_double;
    // results of the forward pass, inputs of the backward pass
    void *class_lse, *instance_lse;  // (k), (m) or null
    void *pos, *z_rnorm, *w_rnorm;   // (m), (m), (k)
    void* kept;                      // `kept_size` numbers for exp(t) of the first row tiles, or null
    int64_t kept_size;
};

struct Gradients {
    const void *class_lse, *instance_lse, *pos;  // upstream, (k), (m), (m) or null
    void *z, *w;                                 // (m, d), (k, d) contiguous, or null; w zero where classes can be absent
    void *sample_bias, *class_bias;              // (m), (k), zeros, or null
    double* beta;                                // or null
};

enum Status : int32_t { kOk = 0, kBadTarget = 1, kBadBeta = 2, kNoMemory = 3 };

namespace scratch {
// Large buffers are pooled: fresh pages from the system would cost as much as the work done on them.
void* acquire(size_t bytes);
void release(void* p, size_t bytes);
}  // namespace scratch

namespace NCK_ISA {

template <class T>
class Buffer {
public:
    explicit Buffer(size_t n) : bytes_(n * sizeof(T)), p_(n ? static_cast<T*>(scratch::acquire(bytes_)) : nullptr) {}
    ~Buffer() {
        if (p_) scratch::release(p_, bytes_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() { return p_; }

private:
    size_t bytes_;
    T* p_;
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The columns that take part, which samples do, and which column each sample's positive is.
struct Columns {
    int64_t count;                  // columns
    bool compact;                   // whether they are the classes `ids`, rather than all in order
    std::vector<int64_t> ids;
    std::vector<int64_t> positive;  // per sample, -1 if it is left out

    int64_t class_of(int64_t c) const { return compact ? ids[c] : c; }
};

// Fills `columns`; returns the offending sample or -1.
inline int64_t find_columns(const Problem& p, Columns& columns) {
    columns.positive.resize(p.m);
    columns.count = p.k;
    columns.compact = p.present_only;
    for (int64_t j = 0; j < p.m; j++) {
        const int64_t y = p.target[j];
        if (y == p.ignore_index)
            columns.positive[j] = -1;
        else if (p.exclude == kSameLabel)
            columns.positive[j] = j;
        else if (y < 0 || y >= p.k)
            return j;
        else
            columns.positive[j] = y;
    }
    if (!p.present_only) return -1;
    std::vector<int64_t> column(p.k, -1);
    for (int64_t c : columns.positive)
        if (c >= 0) column[c] = 0;
    for (int64_t c = 0; c < p.k; c++)
        if (column[c] == 0) {
            column[c] = static_cast<int64_t>(columns.ids.size());
            columns.ids.push_back(c);
        }
    for (int64_t& c : columns.positive)
        if (c >= 0) c = column[c];
    columns.count = static_cast<int64_t>(columns.ids.size());
    return -1;
}

}  // namespace NCK_ISA
}  // namespace nckernels
