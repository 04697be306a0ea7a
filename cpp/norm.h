// Root-mean-square normalisation. Plain data only: this header is compiled once per instruction set.
#pragma once
#include <cstddef>

#include "floats.h"

namespace waterfill::norm {

// y = x / sqrt(mean(x^2) + epsilon), times (offset + weight). All of one type.
struct Call {
    const void* x;       // (rows, n)
    const void* weight;  // (n)
    void* y;             // (rows, n)
    size_t rows, n;
    Float type;
    float epsilon, offset;
    bool rounds_first;   // to the type, before the product with the weight
};

struct Kernels {
    void (*rows)(const Call&, size_t first, size_t last);
};

}  // namespace waterfill::norm

namespace waterfill::scalar { const norm::Kernels& norm_kernels(); }
namespace waterfill::avx2 { const norm::Kernels& norm_kernels(); }
namespace waterfill::avx512 { const norm::Kernels& norm_kernels(); }
