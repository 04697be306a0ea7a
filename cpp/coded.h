// A matrix of integers times scales that stays entropy-coded in memory: what its kernels and their
// callers share. Plain data and constants only: this header is compiled once per instruction set.
//
// The layout is described in docs/coded.md.
#pragma once
#include <cstddef>
#include <cstdint>

#include "floats.h"
#include "trellis.h"

namespace waterfill::coded {

constexpr unsigned kLanes = 128;      // columns of a panel, each with a decoder of its own
constexpr unsigned kTogether = 8;     // lanes that share a string of bits
constexpr unsigned kStrings = kLanes / kTogether;
constexpr unsigned kTile = 32;        // rows of a panel before those of the next
constexpr size_t kSegment = 1024;     // rows after which machines and decoders start again
constexpr unsigned kStates = 128;     // of a decoder
constexpr unsigned kSymbols = 16;     // s stands for q = (s - 8) << shift and as many more as the shift has bits
constexpr unsigned kNarrow = 3;       // up to this shift, a level fits in a byte
constexpr unsigned kMaxShift = 20;    // so that float32 holds every level
constexpr unsigned kMaxBatch = 16;
constexpr int64_t kMaxColumns = 1 << 16;
constexpr unsigned kPlaneNbytes = kLanes / 8;  // of one raw bit of each lane
constexpr size_t kPatchNbytes = 6;    // place in a tile (2), level (4)
constexpr size_t kHalfNbytes = 64;    // of the windows of half the strings; a row takes no more

// Columns of a panel have positions: those of units, activations and weights. The lane of a position is
// such that four vectors of positions are bytes 0, 1, 2 and 3 of the dwords of 64 lanes.
constexpr unsigned lane_of(unsigned position) { return position / 64 * 64 + position % 16 * 4 + position % 64 / 16; }

// Of a table, a byte for each grid and state: [bits : 3][symbol : 4][odd : 1], then the next state
// before those bits are added.
constexpr unsigned kTableNbytes = 4 * kStates;

struct Matrix {
    size_t m, n, panels;
    TrellisCode code;
    Float dtype;                  // that weights are rounded to
    bool tiny;                    // a weight may be subnormal
    bool scaled;                  // a scale is not 1
    const uint8_t* tables;
    const uint8_t* shifts;        // of each table
    const uint8_t* choice;        // level of the row plus that of the panel -> table
    const uint8_t* row_levels;    // (m)
    const uint8_t* panel_levels;  // (panels)
    const uint8_t* tile_levels;   // (m / kTile) greatest level of the rows of each tile
    size_t raw_from;              // the least sum of levels whose table has a shift
    const float* units;           // (panels, kLanes), by position
};

// Rows of one segment, and some panels.
struct Block {
    const Matrix* matrix;
    size_t row, rows, panel, panels;
    size_t group;                // panels that share scales, counted from panel 0
    const float* scales;         // (groups of these panels, rows)
    const uint8_t* states;       // (kLanes)
    const uint8_t* strings[2];   // those of lanes 0 to 63, and of lanes 64 to 127
    size_t n_strings[2];         // bytes of them
    const uint8_t* raw;          // planes of kPlaneNbytes
    const uint8_t* counts;       // patches of each tile of each panel, two bytes each
    const uint8_t* patches;      // levels that their tables have no symbol for, kPatchNbytes each
    size_t n_patches;
    uint8_t* machines;           // room for (panels, kLanes)
};

// Activations (panels, batch, kLanes).
struct Product {
    const void* x;
    bool bf16;  // two bytes each, else float32
    unsigned batch;
    float* y;   // (batch, rows) sums over the block's columns
};

// Weights of the rows with an output, by position: those of panel i go to outs[row] + (panel + i) * kLanes,
// up to column n.
struct Store {
    void* const* outs;  // (rows) null where a row is not wanted
    size_t last;        // rows from here on are not
    bool bf16;          // upper halves of floats, else float32
};

enum class Status { ok, short_of_bytes, wrong_end, wrong_patch };

struct Kernels {
    Status (*multiply)(const Block&, const Product&);
    Status (*store)(const Block&, const Store&);
    // Whether `multiply` takes bfloat16 activations as they are.
    bool (*takes_bf16)(const Matrix&);
};

}  // namespace waterfill::coded

namespace waterfill::scalar { const coded::Kernels& coded_kernels(); }
namespace waterfill::avx2 { const coded::Kernels& coded_kernels(); }
namespace waterfill::avx512 { const coded::Kernels& coded_kernels(); }
