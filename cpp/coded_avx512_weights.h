// Included by coded_avx512.h: fields to weights, and products with them.

// A panel's units; levels of odd vectors come 256 times too large.
struct Units {
    __m512 of[8];
    explicit Units(const float* units) {
        for (int v = 0; v < 8; ++v) of[v] = _mm512_mul_ps(_mm512_loadu_ps(units + 16 * v), _mm512_set1_ps(v % 2 ? 0x1p-8f : 1.0f));
    }
};

__attribute__((noinline)) void wide_levels(const uint8_t* fields, unsigned shift, const uint8_t* raw, __m512* out) {
    alignas(64) float levels[kLanes];
    levels_of_row(fields, shift, raw, levels);
    for (int v = 0; v < 8; ++v) out[v] = _mm512_mul_ps(_mm512_load_ps(levels + 16 * v), _mm512_set1_ps(v % 2 ? 256.0f : 1.0f));
}

// A row's levels, those of odd vectors times 256.
inline void levels_of(const uint8_t* fields, unsigned shift, const uint8_t* raw, __m512* out) {
    if (__builtin_expect(shift == 0, 1)) {
        const Levels4 bytes(31, 16);
        for (int half = 0; half < 2; ++half) bytes.floats(_mm512_loadu_si512(fields + 64 * half), out + 4 * half);
    } else if (shift <= kNarrow) {
        const Levels4 bytes(255, 128);
        for (int half = 0; half < 2; ++half) bytes.floats(narrow(_mm512_loadu_si512(fields + 64 * half), shift, raw + 8 * half), out + 4 * half);
    } else {
        wide_levels(fields, shift, raw, out);
    }
}

// use(row, weights by vectors, not yet rounded) for each row
template <class Use> inline __attribute__((always_inline)) void each_row(const Levels& levels, Use use) {
    const Tile& tile = levels.tile;
    const Units units(levels.units);
    const uint8_t* raw = tile.raw;
    for (size_t row = 0; row < tile.rows; ++row) {
        const unsigned shift = levels.raw ? tile.shift(row) : 0;
        __m512 w[8];
        levels_of(tile.fields + row * kLanes, shift, raw, w);
        raw += shift * kPlaneNbytes;
        WATERFILL_UNROLL
        for (int v = 0; v < 8; ++v) {
            w[v] = _mm512_mul_ps(w[v], units.of[v]);
            if (tile.matrix->scaled) w[v] = _mm512_mul_ps(w[v], _mm512_set1_ps(levels.scales[row]));
        }
        use(row, w);
    }
}

inline __m512 rounded(__m512 value, Float dtype) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7FFF));
    if (dtype == Float::bf16) return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xFFFF0000))));
    if (dtype == Float::f16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return value;
}

// out (rows, kLanes)
void fill(const Levels& levels, float* out) {
    const Float dtype = levels.tile.matrix->dtype;
    each_row(levels, [&](size_t row, const __m512* w) {
        for (int v = 0; v < 8; ++v) _mm512_store_ps(out + row * kLanes + 16 * v, rounded(w[v], dtype));
    });
}

constexpr unsigned kSums = 16;  // partial sums of a row

// sums[token][row][kSums] += products of `rows` rows of weights with a panel's activations
void add_products(const float* weights, size_t rows, const float* x, unsigned batch, float* sums) {
    for (unsigned token = 0; token < batch; ++token, x += kLanes) {
        __m512 factor[8];
        for (int v = 0; v < 8; ++v) factor[v] = _mm512_loadu_ps(x + 16 * v);
        float* sum = sums + size_t(token) * kTile * kSums;
        for (size_t row = 0; row < rows; ++row) {
            __m512 a = _mm512_load_ps(sum + row * kSums), b = _mm512_setzero_ps();
            WATERFILL_UNROLL
            for (int v = 0; v < 8; v += 2) {
                a = _mm512_fmadd_ps(_mm512_load_ps(weights + row * kLanes + 16 * v), factor[v], a);
                b = _mm512_fmadd_ps(_mm512_load_ps(weights + row * kLanes + 16 * v + 16), factor[v + 1], b);
            }
            _mm512_store_ps(sum + row * kSums, _mm512_add_ps(a, b));
        }
    }
}

inline float total(const float* sums) { return _mm512_reduce_add_ps(_mm512_load_ps(sums)); }

// The same with instructions for bfloat16, which take subnormal numbers for zero.
#define WATERFILL_BF16 __attribute__((target("avx512bf16")))

WATERFILL_BF16 void fill_bf16(const Levels& levels, uint16_t* out) {
    each_row(levels, [&](size_t row, const __m512* w) WATERFILL_BF16 {
        WATERFILL_UNROLL
        for (int v = 0; v < 8; v += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh(w[v + 1], w[v]);
            _mm512_store_si512(out + row * kLanes + 16 * v, reinterpret_cast<const __m512i&>(both));
        }
    });
}

inline __m512bh halves(const uint16_t* at) {
    const __m512i bits = _mm512_loadu_si512(at);
    return reinterpret_cast<const __m512bh&>(bits);
}

WATERFILL_BF16 void add_products_bf16(const uint16_t* weights, size_t rows, const uint16_t* x, unsigned batch, float* sums) {
    for (unsigned token = 0; token < batch; ++token, x += kLanes) {
        __m512bh factor[4];
        for (int v = 0; v < 4; ++v) factor[v] = halves(x + 32 * v);
        float* sum = sums + size_t(token) * kTile * kSums;
        for (size_t row = 0; row < rows; ++row) {
            __m512 a = _mm512_load_ps(sum + row * kSums);
            WATERFILL_UNROLL
            for (int v = 0; v < 4; ++v) a = _mm512_dpbf16_ps(a, halves(weights + row * kLanes + 32 * v), factor[v]);
            _mm512_store_ps(sum + row * kSums, a);
        }
    }
}

bool has_bf16() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
}

bool takes_bf16(const Matrix& matrix) { return matrix.dtype == Float::bf16 && !matrix.tiny && has_bf16(); }
