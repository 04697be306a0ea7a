// Included by coded_kernel.cpp, inside its namespace, where AVX-512 (F, BW, DQ, VL, VBMI, VBMI2) is on.

#define WATERFILL_UNROLL _Pragma("GCC unroll 8")

inline __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }

// 64 lanes: eight strings.
struct Half {
    __m512i state, window, position, machine;

    Half(const Reader& reader, const uint8_t* machines, int half)
        : state(_mm512_load_si512(reader.states + 64 * half)), window(_mm512_load_si512(reader.windows + 8 * half)),
          position(_mm512_load_si512(reader.positions + 8 * half)), machine(_mm512_loadu_si512(machines + 64 * half)) {}

    void put_back(Reader& reader, uint8_t* machines, int half) const {
        _mm512_store_si512(reader.states + 64 * half, state);
        _mm512_store_si512(reader.windows + 8 * half, window);
        _mm512_store_si512(reader.positions + 8 * half, position);
        _mm512_storeu_si512(machines + 64 * half, machine);
    }
};

struct Constants {
    __m512i feedback, input, masks, last_byte, fresh;
    explicit Constants(const TrellisCode& code)
        : feedback(_mm512_set1_epi8(char(code.feedback))), input(_mm512_set1_epi8(char(code.input))),
          masks(_mm512_set1_epi64(0x7F3F1F0F07030100)), last_byte(_mm512_broadcast_i32x4(_mm_set_epi64x(0x0F0F0F0F0F0F0F0F, 0x0707070707070707))),
          fresh(_mm512_set1_epi64(0x08101820'28303840)) {}
};

// A row's table in registers, for both halves.
struct Lookup {
    __m512i part[8];

    explicit Lookup(const uint8_t* table) {
        WATERFILL_UNROLL
        for (int i = 0; i < 8; ++i) {
            part[i] = _mm512_loadu_si512(table + 64 * i);
            asm("" : "+v"(part[i]));  // else each half would load them again
        }
    }

    __m512i entry(__m512i state, __mmask64 grid) const { return at<0>(state, grid); }
    __m512i base(__m512i state, __mmask64 grid) const { return at<4>(state, grid); }

private:
    template <int kFirst> __m512i at(__m512i state, __mmask64 grid) const {
        const __m512i even = _mm512_permutex2var_epi8(part[kFirst], state, part[kFirst + 1]);
        return _mm512_mask_mov_epi8(even, grid, _mm512_permutex2var_epi8(part[kFirst + 2], state, part[kFirst + 3]));
    }
};

// One symbol of each lane; `raw` flips parities.
inline __m512i step(Half& h, const Lookup& table, __mmask64 raw, const Constants& c, const uint8_t*& at) {
    const __mmask64 grid = _mm512_test_epi8_mask(h.machine, _mm512_set1_epi8(1));
    const __m512i entry = table.entry(h.state, grid), base = table.base(h.state, grid);
    // How many bits each lane takes, and from where in its window: sums over the lanes before it.
    const __m512i bits = _mm512_and_si512(_mm512_srli_epi16(entry, 5), _mm512_set1_epi8(7));
    const __m512i sums = _mm512_mullo_epi64(_mm512_add_epi8(bits, h.position), _mm512_set1_epi64(0x0101010101010101));
    const __m512i taken = _mm512_multishift_epi64_epi8(_mm512_sub_epi8(sums, bits), h.window);
    // base | (taken & mask)
    h.state = _mm512_ternarylogic_epi32(base, taken, _mm512_shuffle_epi8(c.masks, bits), 0xF8);
    // Whole bytes leave the window; as many come in at its top.
    const __m512i used = _mm512_srli_epi64(sums, 56);
    const __mmask64 fresh = _mm512_cmpge_epu8_mask(_mm512_shuffle_epi8(sums, c.last_byte), c.fresh);
    __m512i next = _mm512_loadu_si512(at);
    asm("" : "+v"(next));  // expanding straight from memory is several times slower on some machines
    h.window = _mm512_mask_expand_epi8(_mm512_srlv_epi64(h.window, _mm512_and_si512(used, _mm512_set1_epi64(56))), fresh, next);
    h.position = _mm512_and_si512(used, _mm512_set1_epi64(7));
    at += __builtin_popcountll(fresh);
    const __m512i fields = select(_mm512_set1_epi8(0x1E), entry, h.machine);
    const __mmask64 odd = _mm512_test_epi8_mask(entry, _mm512_set1_epi8(1)) ^ raw;
    // (state / 2) ^ feedback
    h.machine = _mm512_ternarylogic_epi32(_mm512_srli_epi16(h.machine, 1), _mm512_set1_epi8(0x7F), _mm512_maskz_mov_epi8(grid, c.feedback), 0x6A);
    h.machine = _mm512_xor_si512(h.machine, _mm512_maskz_mov_epi8(odd, c.input));
    return fields;
}

constexpr uint8_t kNoPlane[kPlaneNbytes] = {};

template <bool kRaw> void decode_rows(Reader& reader, Tile& tile) {
    const Constants constants(tile.matrix->code);
    Half low(reader, tile.machine, 0), high(reader, tile.machine, 1);
    const uint8_t *at0 = reader.bytes[0].at, *at1 = reader.bytes[1].at, *raw = tile.raw;
    size_t row = 0;
    for (; row < tile.rows && at0 <= reader.bytes[0].limit && at1 <= reader.bytes[1].limit; ++row) {
        uint64_t odd[2] = {0, 0};
        if (kRaw) {
            const unsigned shift = tile.shift(row);
            const uint8_t* lowest = kNoPlane;
            lowest = shift ? raw : lowest;  // no branch: shifts come in no order
            std::memcpy(odd, lowest, 16);
            raw += shift * kPlaneNbytes;
        }
        const Lookup table(tile.entries(row));
        _mm512_storeu_si512(tile.fields + row * kLanes, step(low, table, odd[0], constants, at0));
        _mm512_storeu_si512(tile.fields + row * kLanes + 64, step(high, table, odd[1], constants, at1));
    }
    low.put_back(reader, tile.machine, 0);
    high.put_back(reader, tile.machine, 1);
    reader.bytes[0].at = at0;
    reader.bytes[1].at = at1;
    tile.advance(row, raw);
}

// The four vectors of levels in 64 bytes: each byte in the mantissa of a large number, which goes.
struct Levels4 {
    __m512i mask[2];
    __m512 base[2];
    Levels4(int mask, float zero)
        : mask{_mm512_set1_epi32(mask), _mm512_set1_epi32(mask << 8)}, base{_mm512_set1_ps(0x1p23f + zero), _mm512_set1_ps(0x1p23f + 256 * zero)} {}

    // Those of bytes 1 and 3 come 256 times too large.
    void floats(__m512i packed, __m512* out) const {
        const __m512i magic = _mm512_castps_si512(_mm512_set1_ps(0x1p23f));
        const __m512i upper = _mm512_srli_epi32(packed, 16);
        WATERFILL_UNROLL
        for (int j = 0; j < 4; ++j) {
            // (packed & mask) | magic
            const __m512i bits = _mm512_ternarylogic_epi32(j < 2 ? packed : upper, mask[j % 2], magic, 0xEA);
            out[j] = _mm512_sub_ps(_mm512_castsi512_ps(bits), base[j % 2]);
        }
    }
};

// Fields of a shift up to kNarrow -> levels plus 128.
inline __m512i narrow(__m512i fields, unsigned shift, const uint8_t* raw) {
    __m512i level = _mm512_slli_epi32(_mm512_and_si512(fields, _mm512_set1_epi8(0x1E)), shift);
    level = _mm512_or_si512(level, _mm512_and_si512(fields, _mm512_set1_epi8(1)));
    for (unsigned b = 0; b < shift; ++b) {
        uint64_t plane;
        std::memcpy(&plane, raw + b * kPlaneNbytes, 8);
        level = _mm512_or_si512(level, _mm512_maskz_set1_epi8(plane, char(2 << b)));
    }
    return _mm512_add_epi8(level, _mm512_set1_epi8(char(128 - (16 << shift))));
}
