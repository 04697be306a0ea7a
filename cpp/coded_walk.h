// Included by coded_kernel.cpp: the tiles of a block in their order, whatever becomes of them.

// consume(levels, patches, how many, row, panel) for each tile, rows and panels counted from the
// block's first, as far as the tile of row `last` - 1.
template <class Consume> Status walk(const Block& block, size_t last, Consume consume) {
    const Matrix& matrix = *block.matrix;
    Reader reader(block);
    std::memset(block.machines, 0, block.panels * kLanes);
    alignas(64) uint8_t fields[kTile * kLanes];
    const uint8_t *raw = block.raw, *count = block.counts, *patch = block.patches;
    const uint8_t* const end = patch + block.n_patches * kPatchNbytes;
    const size_t first_group = block.panel / block.group;
    for (size_t row = 0; row < last; row += kTile) {
        const size_t rows = block.rows - row < kTile ? block.rows - row : kTile;
        for (size_t i = 0; i < block.panels; ++i, count += 2) {
            const size_t panel = block.panel + i;
            const Tile tile{fields, block.machines + i * kLanes, &matrix, matrix.choice + matrix.panel_levels[panel], matrix.row_levels + block.row + row, raw, rows};
            const bool has_raw = matrix.panel_raw[panel];
            if (!(has_raw ? reader.decode(tile, decode_rows<true>) : reader.decode(tile, decode_rows<false>))) return Status::short_of_bytes;
            for (size_t r = 0; has_raw && r < rows; ++r) raw += tile.shift(r) * kPlaneNbytes;
            const size_t patches = count[0] | count[1] << 8;
            if (patches * kPatchNbytes > size_t(end - patch)) return Status::wrong_patch;
            consume(Levels{tile, matrix.units + panel * kLanes, block.scales + (panel / block.group - first_group) * block.rows + row, has_raw}, patch, patches, row, i);
            patch += patches * kPatchNbytes;
        }
    }
    return last < block.rows || reader.at_end() ? Status::ok : Status::wrong_end;
}

// The weight that a patch stands for, and its place in a tile.
struct Patch {
    unsigned place;
    float weight;

    Patch(const uint8_t* at, const Levels& levels) {
        uint16_t where;
        int32_t level;
        std::memcpy(&where, at, 2);
        std::memcpy(&level, at + 2, 4);
        place = where % (kTile * kLanes);
        const Matrix& matrix = *levels.tile.matrix;
        const float value = float(level) * levels.units[place % kLanes];
        // Rows beyond the tile's have no scale, and nobody reads their weights.
        const unsigned row = place / kLanes;
        weight = rounded(row < levels.tile.rows ? value * levels.scales[row] : 0.0f, matrix.dtype);
    }
};

inline uint16_t upper_half(float value) { return uint16_t(rounded_bits(bits_of(value), 16) >> 16); }

inline void mend(const Levels& levels, const uint8_t* patch, size_t patches, float* weights) {
    for (size_t i = 0; i < patches; ++i) {
        const Patch one(patch + i * kPatchNbytes, levels);
        weights[one.place] = one.weight;
    }
}

inline void mend(const Levels& levels, const uint8_t* patch, size_t patches, uint16_t* weights) {
    for (size_t i = 0; i < patches; ++i) {
        const Patch one(patch + i * kPatchNbytes, levels);
        weights[one.place] = upper_half(one.weight);
    }
}

// Room for the weights of a tile, in either width.
struct Weights {
    alignas(64) float floats[kTile * kLanes];
    alignas(64) uint16_t halves[kTile * kLanes];
};

Status multiply(const Block& block, const Product& product) {
    Weights weights;
    alignas(64) float sums[kMaxBatch * kTile * kSums];
    return walk(block, block.rows, [&](const Levels& levels, const uint8_t* patch, size_t patches, size_t row, size_t i) {
        if (i == 0) std::memset(sums, 0, product.batch * kTile * kSums * sizeof(float));
        const size_t at = (block.panel + i) * product.batch * kLanes, rows = levels.tile.rows;
#if defined(WATERFILL_ISA_avx512)
        if (product.bf16) {
            fill_bf16(levels, weights.halves);
            mend(levels, patch, patches, weights.halves);
            add_products_bf16(weights.halves, rows, static_cast<const uint16_t*>(product.x) + at, product.batch, sums);
        } else
#endif
        {
            fill(levels, weights.floats);
            mend(levels, patch, patches, weights.floats);
            add_products(weights.floats, rows, static_cast<const float*>(product.x) + at, product.batch, sums);
        }
        if (i + 1 < block.panels) return;
        for (unsigned token = 0; token < product.batch; ++token) totals(sums + token * kTile * kSums, rows, product.y + token * block.rows + row);
    });
}

Status store(const Block& block, const Store& to) {
    Weights weights;
    const Matrix& matrix = *block.matrix;
    return walk(block, to.last, [&](const Levels& levels, const uint8_t* patch, size_t patches, size_t row, size_t i) {
        const size_t rows = levels.tile.rows, column = (block.panel + i) * kLanes;
        bool wanted = false;
        for (size_t r = 0; r < rows; ++r) wanted |= to.outs[row + r] != nullptr;
        if (!wanted) return;
        bool in_halves = false;
#if defined(WATERFILL_ISA_avx512)
        in_halves = to.bf16 && takes_bf16(matrix);
        if (in_halves) {
            fill_bf16(levels, weights.halves);
            mend(levels, patch, patches, weights.halves);
        }
#endif
        if (!in_halves) {
            fill(levels, weights.floats);
            mend(levels, patch, patches, weights.floats);
            if (to.bf16)
                for (size_t k = 0; k < rows * kLanes; ++k) weights.halves[k] = upper_half(weights.floats[k]);
        }
        const size_t width = matrix.n - column < kLanes ? matrix.n - column : kLanes;
        for (size_t r = 0; r < rows; ++r) {
            if (!to.outs[row + r]) continue;
            if (to.bf16) std::memcpy(static_cast<uint16_t*>(to.outs[row + r]) + column, weights.halves + r * kLanes, 2 * width);
            else std::memcpy(static_cast<float*>(to.outs[row + r]) + column, weights.floats + r * kLanes, 4 * width);
        }
    });
}
