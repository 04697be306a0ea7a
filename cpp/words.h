// Words of a tensor taken apart: the exponent (and perhaps the first mantissa bits) as a field that
// is coded, the rest as planes that are kept. Plain data only; docs/format/lossless.md has the layout.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill::words {

constexpr unsigned kMaxPlanes = 8;
constexpr unsigned kMaxFieldBits = 16;

// A word of w bytes is [sign][field][mantissa]: the rest is sign and mantissa side by side, cut into
// planes of a byte from the bottom, so that the first plane may be narrower. Without a field the
// rest is the word.
struct Layout {
    unsigned width;       // bytes of a word: 1, 2, 4 or 8
    unsigned field_bits;  // 0 to 16, fewer than the word has

    constexpr unsigned rest_bits() const { return 8 * width - field_bits; }
    constexpr unsigned planes() const { return (rest_bits() + 7) / 8; }
    constexpr unsigned first_bits() const { return rest_bits() - 8 * (planes() - 1); }  // of the first plane
};

// One plane to put back: a byte for each word, or the first plane's bits one after the other, or
// nothing, where all bytes are alike.
struct Plane {
    enum Kind { bytes, packed, constant } kind;
    const uint8_t* at;
    size_t nbytes;
};

// A field's value is `low` plus its symbol; the symbol `escape` stands for a value that comes later.
struct Join {
    Layout layout;
    uint32_t low;
    Plane planes[kMaxPlanes];  // most significant first
    uint64_t fixed;            // what constant planes add to the rest
    void* out;
};

// Values of a field outside low .. low + escape - 1 get the symbol `escape`; none may be where it is 256.
struct Split {
    Layout layout;
    uint32_t low;
    uint32_t escape;
    const void* words;
    uint8_t* symbols;  // null where there is no field
    uint8_t* planes[kMaxPlanes];  // null where it is not wanted
    bool packed;  // the first plane's bits one after the other
};

struct Kernels {
    // Words first .. first + count - 1; `symbols` begins with the first's. At most rans::kTile.
    void (*join)(const Join&, const uint8_t* symbols, size_t first, size_t count);
    // The same range the other way; `first` is a multiple of 8.
    void (*split)(const Split&, size_t first, size_t count);
};

}  // namespace waterfill::words

namespace waterfill::scalar { const words::Kernels& words_kernels(); }
namespace waterfill::avx2 { const words::Kernels& words_kernels(); }
namespace waterfill::avx512 { const words::Kernels& words_kernels(); }
