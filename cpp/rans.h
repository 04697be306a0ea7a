// What the rANS kernels and their callers share. Plain data and constants only: this header is
// compiled once per instruction set, so a function here would be merged across them by the linker.
//
// The bitstream itself is described in docs/format/rans.md.
#pragma once
#include <cstddef>
#include <cstdint>

namespace waterfill::rans {

constexpr unsigned kScaleBits = 12;
constexpr uint32_t kTotal = 1u << kScaleBits;
constexpr uint32_t kLower = 1u << 16;
constexpr unsigned kMaxLanes = 128;
constexpr unsigned kBuckets = 32;     // alias layout: 32 buckets ...
constexpr unsigned kBucketSlots = 128;  // ... of 128 slots
constexpr unsigned kBucketBits = 7;

// Alias entries, two per bucket: 32 primary dwords, then 32 alias dwords.
//   primary  [cut - 1 : 7][unused : 7][symbol : 5][frequency : 13], all zero where cut = 0
//   alias    [bias : 13, signed][unused : 1][symbol : 5][frequency : 13]
// With the cut in the topmost bits above a frequency that is never zero, one unsigned compare of
// (x << 25) >= primary says "alias", for every cut from 0 to 128.
constexpr unsigned kBucketDwords = 2 * kBuckets;
constexpr uint32_t kFrequencyMask = 0x1FFF;
constexpr unsigned kSymbolShift = 13;
constexpr unsigned kBiasShift = 19;

struct DecodeTables {
    const uint32_t* buckets = nullptr;  // [class][64], for an alphabet of at most 32
    const uint32_t* slots = nullptr;    // [class][4096]: [output : 8][bias : 12][frequency - 1 : 12]
    alignas(64) uint8_t lut[64] = {};   // symbol -> output byte, where buckets are used
    bool identity = true;               // lut[i] == i throughout
};

// Takes the symbols of a one-row block as they come, some at a time: `count` of them from
// column `first` of the matrix on.
struct Sink {
    void (*take)(void* context, const uint8_t* symbols, size_t first, size_t count);
    void* context;
};
constexpr size_t kTile = 1024;  // symbols handed over at a time: few, so that memory is never waited for in bursts

struct DecodeBlock {
    const DecodeTables* tables;
    const uint8_t* states;  // n_states little-endian dwords
    unsigned n_states;
    const uint8_t* words;  // n_words little-endian 16-bit words
    size_t n_words;
    uint8_t* out;  // first symbol of the block
    size_t stride;
    size_t rows;
    size_t cols;
    unsigned lanes;
    const uint8_t* classes;  // of the block's columns; null where all are of class 0
    const Sink* sink;        // null where symbols go to `out`; else one row of class 0
    size_t first;            // column of the matrix where the block begins, for the sink
};

enum class Status { ok, low_state, words_short, words_left, wrong_end };

struct EncodeSymbol {
    uint64_t reciprocal;  // ceil(2^44 / frequency)
    uint32_t limit;       // a state above this gives up a word first
    uint16_t frequency;
    uint16_t base;  // of the symbol's offsets in `slots`
};

// Where the slots of at most 32 symbols are: a symbol's are those of its own bucket, up to the cut, and
// then pieces of other buckets. Laid end to end, the pieces of all symbols make a line of at most 4096
// places, where a table of cells of 32 places says which piece a cell begins in.
struct SlotPieces {
    static constexpr unsigned kCells = kTotal / 32, kMostSteps = 2;
    bool usable = false;
    unsigned steps = 0;  // pieces that may end within a cell
    uint32_t cuts[kBuckets] = {}, shifts[kBuckets] = {};
    uint8_t cells[kCells] = {};
    uint16_t ends[kBuckets] = {}, moves[kBuckets] = {};
};

struct EncodeTables {
    const EncodeSymbol* symbols;  // [class][256]
    const uint16_t* slots;        // [class][4096]: base + offset -> slot, and two bytes more
    const SlotPieces* pieces;     // [class]; null where a class has more than 32 symbols
};

struct EncodeBlock {
    const EncodeTables* tables;
    const uint8_t* in;
    size_t stride;
    size_t rows;
    size_t cols;
    unsigned lanes;
    const uint8_t* classes;  // of the block's columns, or null
    uint32_t* states;     // `lanes` of them, written
    uint16_t* words_end;  // words are written downwards from here
};

struct Kernels {
    Status (*decode_block)(const DecodeBlock&);
    // Number of words written, or SIZE_MAX where a symbol has no frequency.
    size_t (*encode_block)(const EncodeBlock&);
};

}  // namespace waterfill::rans

namespace waterfill::scalar { const rans::Kernels& rans_kernels(); }
namespace waterfill::avx2 { const rans::Kernels& rans_kernels(); }
namespace waterfill::avx512 { const rans::Kernels& rans_kernels(); }
