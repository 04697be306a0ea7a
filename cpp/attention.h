// Attention of few queries over many keys, as a model does it for each token it writes. Plain data
// only: this header is compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "floats.h"

namespace waterfill::attention {

constexpr size_t kChunk = 256;     // keys whose softmax is taken together; results depend on it
constexpr size_t kMaxWidth = 512;  // of a key or a value
constexpr size_t kHead = 16;       // floats before the sum of values: greatest score, sum of weights

// (batch, head, token, width) of the call's type; strides of the first three, in elements.
struct Tensor {
    const void* at;
    ptrdiff_t strides[3];
};

enum class MaskKind { none, boolean, added };

// (batch, head, query, key), strides in elements: bytes that are 0 where a key is hidden, or numbers
// of the call's type to be added to the scores.
struct Mask {
    MaskKind kind;
    const void* at;
    ptrdiff_t strides[4];
};

// Query head i shares key/value head i / (heads / shared).
struct Call {
    size_t batch, heads, shared, queries, keys, key_width, value_width;
    Float type;
    Tensor q, k, v;
    Mask mask;
    float scale;
    void* out;  // (batch, query, head, value_width), contiguous

    size_t groups() const { return batch * shared; }
    size_t rows() const { return heads / shared * queries; }  // of a group
    size_t chunks() const { return (keys + kChunk - 1) / kChunk; }
    size_t row_floats() const { return kHead + (value_width + 15) / 16 * 16; }
    size_t partial_floats() const { return rows() * row_floats(); }
};

struct Kernels {
    // Of one chunk of keys, the greatest score, the sum of weights and the sum of weighted values.
    void (*attend)(const Call&, size_t group, size_t chunk, float* partial);
    // The chunks of a group, in order, into `out`; changes them.
    void (*merge)(const Call&, size_t group, float* partials);
};

}  // namespace waterfill::attention

namespace waterfill::scalar { const attention::Kernels& attention_kernels(); }
namespace waterfill::avx2 { const attention::Kernels& attention_kernels(); }
namespace waterfill::avx512 { const attention::Kernels& attention_kernels(); }
