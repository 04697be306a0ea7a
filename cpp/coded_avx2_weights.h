// Included by coded_kernel.cpp, inside its namespace, where AVX2 and FMA are on.

// Eight levels: byte `byte` of each dword is a field, and bits 4 i + byte of the planes are its raw bits.
inline __m256i eight_levels(__m256i packed, unsigned byte, unsigned shift, const uint8_t* raw) {
    const __m256i field = _mm256_srli_epi32(packed, int(8 * byte));
    if (!shift) return _mm256_sub_epi32(_mm256_and_si256(field, _mm256_set1_epi32(31)), _mm256_set1_epi32(kSymbols));
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i q = _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(field, 1), _mm256_set1_epi32(15)), _mm256_set1_epi32(kSymbols / 2));
    for (unsigned b = shift; b-- > 0;) {
        uint32_t plane;
        std::memcpy(&plane, raw + b * kPlaneNbytes, 4);
        const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(int(_pext_u32(plane, 0x11111111u << byte))), places);
        q = _mm256_sub_epi32(_mm256_add_epi32(q, q), _mm256_cmpeq_epi32(bits, places));
    }
    return _mm256_or_si256(_mm256_add_epi32(q, q), _mm256_and_si256(field, _mm256_set1_epi32(1)));
}

inline __m256 rounded8(__m256 value, Float dtype) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, even), _mm256_set1_epi32(0x7FFF));
    if (dtype == Float::bf16) return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xFFFF0000))));
    if (dtype == Float::f16) return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return value;
}

template <Float kTo> void fill_as(const Levels& levels, float* out) {
    const Tile& tile = levels.tile;
    const uint8_t* raw = tile.raw;
    for (size_t row = 0; row < tile.rows; ++row, out += kLanes) {
        const unsigned shift = levels.raw ? tile.shift(row) : 0;
        const __m256 scale = _mm256_set1_ps(levels.scales[row]);
        for (unsigned first = 0; first < kLanes; first += 32) {
            const __m256i packed = load(tile.fields + row * kLanes + first);
            _Pragma("GCC unroll 4")
            for (unsigned byte = 0; byte < 4; ++byte) {
                const unsigned at = first / 64 * 64 + 16 * byte + first % 64 / 4;
                const __m256 level = _mm256_cvtepi32_ps(eight_levels(packed, byte, shift, raw + first / 8));
                const __m256 value = _mm256_mul_ps(_mm256_mul_ps(level, _mm256_loadu_ps(levels.units + at)), scale);
                _mm256_store_ps(out + at, rounded8(value, kTo));
            }
        }
        raw += shift * kPlaneNbytes;
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

constexpr unsigned kSums = 8;  // partial sums of a row

// sums[token][row][kSums] += products of `rows` rows of weights with a panel's activations
void add_products(const float* weights, size_t rows, const float* x, unsigned batch, float* sums) {
    for (unsigned token = 0; token < batch; ++token, x += kLanes)
        for (size_t row = 0; row < rows; ++row) {
            float* const sum = sums + (token * kTile + row) * kSums;
            const float* const w = weights + row * kLanes;
            __m256 part[4] = {_mm256_load_ps(sum), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
            _Pragma("GCC unroll 16")
            for (unsigned i = 0; i < kLanes / 8; ++i) part[i % 4] = _mm256_fmadd_ps(_mm256_load_ps(w + 8 * i), _mm256_loadu_ps(x + 8 * i), part[i % 4]);
            _mm256_store_ps(sum, _mm256_add_ps(_mm256_add_ps(part[0], part[2]), _mm256_add_ps(part[1], part[3])));
        }
}

// y[row] = the sum of its kSums partial sums
void totals(const float* sums, size_t rows, float* y) {
    for (size_t row = 0; row < rows; ++row, sums += kSums) {
        const __m256 eight = _mm256_load_ps(sums);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        y[row] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
}

bool takes_bf16(const Matrix&) { return false; }
