// Walsh-Hadamard transform of rows, block by block. Plain data only: this header is compiled once
// per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill::hadamard {

constexpr size_t kMaxBlock = 32768;

// Each block of a row becomes scale * H * block, H the symmetric matrix of +-1 in Sylvester's order.
struct Job {
    const float* in;
    float* out;           // `in`, or apart from it
    size_t columns;       // of a row
    size_t block;         // a power of two from 2 to kMaxBlock that divides `columns`
    float scale;
    const int8_t* signs;  // (columns) of +-1, or null
    bool signs_last;      // signs multiply what comes out, not what goes in
};

struct Kernels {
    // Numbers first .. first + count - 1 of all rows end to end: whole blocks.
    void (*transform)(const Job&, size_t first, size_t count);
};

}  // namespace waterfill::hadamard

namespace waterfill::scalar { const hadamard::Kernels& hadamard_kernels(); }
namespace waterfill::avx2 { const hadamard::Kernels& hadamard_kernels(); }
namespace waterfill::avx512 { const hadamard::Kernels& hadamard_kernels(); }
