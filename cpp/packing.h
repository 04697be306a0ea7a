// Values of a fixed width one after the other, least significant bit first. Plain data only: this
// header is compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill::packing {

// A value takes bits [i * width, (i + 1) * width) of the bytes; eight take `width` bytes.
struct Kernels {
    // `width` is 1 to 7. Groups of eight values: whole ones, and what is left, zeros after it.
    void (*unpack)(const uint8_t* bytes, size_t nbytes, unsigned width, uint8_t* values, size_t count);
    // Bits of a value beyond its width are ignored; the last byte is filled up with zeros.
    void (*pack)(const uint8_t* values, size_t count, unsigned width, uint8_t* bytes, size_t nbytes);
};

}  // namespace waterfill::packing

namespace waterfill::scalar { const packing::Kernels& packing_kernels(); }
namespace waterfill::avx2 { const packing::Kernels& packing_kernels(); }
namespace waterfill::avx512 { const packing::Kernels& packing_kernels(); }
