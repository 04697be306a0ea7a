// Included by coded_kernel.cpp, inside its namespace, where AVX-512 is not on: loops that a compiler
// makes vectors of.

// Levels of a row of any shift, by position.
inline void levels_of_row(const uint8_t* fields, unsigned shift, const uint8_t* raw, float* out) {
    for (unsigned position = 0; position < kLanes; ++position) {
        const unsigned lane = lane_of(position);
        int32_t q = int32_t(fields[lane] >> 1 & (kSymbols - 1)) - int32_t(kSymbols / 2);
        for (unsigned b = shift; b-- > 0;) q = q * 2 + (raw[b * kPlaneNbytes + lane / 8] >> (lane % 8) & 1);
        out[position] = float(2 * q + (fields[lane] & 1));
    }
}

// Those of a row without raw bits.
inline void plain_levels(const uint8_t* fields, float* out) {
    for (unsigned first = 0; first < kLanes; first += 64) {
        uint32_t packed[16];
        std::memcpy(packed, fields + first, 64);
        for (unsigned j = 0; j < 4; ++j)
            for (unsigned i = 0; i < 16; ++i) out[first + 16 * j + i] = float(int32_t(packed[i] >> (8 * j) & 31) - int32_t(kSymbols));
    }
}

template <Float kTo> void fill_as(const Levels& levels, float* out) {
    const Tile& tile = levels.tile;
    const uint8_t* raw = tile.raw;
    for (size_t row = 0; row < tile.rows; ++row, out += kLanes) {
        const unsigned shift = levels.raw ? tile.shift(row) : 0;
        if (shift) levels_of_row(tile.fields + row * kLanes, shift, raw, out);
        else plain_levels(tile.fields + row * kLanes, out);
        raw += shift * kPlaneNbytes;
        const float scale = levels.scales[row];
        for (unsigned i = 0; i < kLanes; ++i) out[i] = rounded(out[i] * levels.units[i] * scale, kTo);
    }
}

// out (rows, kLanes)
void fill(const Levels& levels, float* out) {
    switch (levels.tile.matrix->dtype) {
        case Float::bf16: return fill_as<Float::bf16>(levels, out);
        case Float::f16: return fill_as<Float::f16>(levels, out);
        default: return fill_as<Float::f32>(levels, out);
    }
}

constexpr unsigned kSums = 16;  // partial sums of a row

// sums[token][row][kSums] += products of `rows` rows of weights with a panel's activations
void add_products(const float* weights, size_t rows, const float* x, unsigned batch, float* sums) {
    for (unsigned token = 0; token < batch; ++token, x += kLanes)
        for (size_t row = 0; row < rows; ++row) {
            float* const sum = sums + (token * kTile + row) * kSums;
            const float* const w = weights + row * kLanes;
            float part[kSums] = {};
            for (unsigned first = 0; first < kLanes; first += kSums)
                for (unsigned i = 0; i < kSums; ++i) part[i] += w[first + i] * x[first + i];
            for (unsigned i = 0; i < kSums; ++i) sum[i] += part[i];
        }
}

// y[row] = the sum of its kSums partial sums
void totals(const float* sums, size_t rows, float* y) {
    for (size_t row = 0; row < rows; ++row, sums += kSums) {
        float eight[8], four[4];
        for (unsigned i = 0; i < 8; ++i) eight[i] = sums[i] + sums[i + 8];
        for (unsigned i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
        y[row] = (four[0] + four[2]) + (four[1] + four[3]);
    }
}

bool takes_bf16(const Matrix&) { return false; }
