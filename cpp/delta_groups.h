// Included by delta_kernel.cpp, inside its namespace: 64 elements at a time as masks of 64 bits.

inline uint64_t lanes(unsigned count) { return count >= kGroup ? ~uint64_t(0) : (uint64_t(1) << count) - 1; }

template <class W> inline uint8_t exponent_of(W word, const Words& how) {
    const W exponent = W(W(word >> how.shift) & W(how.mask));
    if constexpr (sizeof(W) < 8) return uint8_t(exponent);
    const int64_t moved = int64_t(exponent) - int64_t(how.offset);
    return uint8_t(moved < 0 ? 0 : moved > 255 ? 255 : moved);
}

template <class W> inline void exponents_of(const W* words, const Words& how, uint8_t* out) {
    for (unsigned i = 0; i < kGroup; ++i) out[i] = exponent_of(words[i], how);
}

#if defined(WATERFILL_ISA_avx512)

struct Exponents {
    __m512i bytes;
    uint64_t at_least(uint8_t least) const { return _mm512_cmpge_epu8_mask(bytes, _mm512_set1_epi8(char(least))); }
};

template <class W> inline Exponents exponents(const W* words, const Words& how) {
    if constexpr (sizeof(W) == 2) {
        const __m128i shift = _mm_cvtsi32_si128(int(how.shift));
        const __m512i mask = _mm512_set1_epi16(short(how.mask));
        const auto half = [&](const W* at) { return _mm512_cvtepi16_epi8(_mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(at), shift), mask)); };
        return {_mm512_inserti64x4(_mm512_castsi256_si512(half(words)), half(words + 32), 1)};
    }
    alignas(64) uint8_t bytes[kGroup];
    exponents_of(words, how, bytes);
    return {_mm512_load_si512(bytes)};
}

template <class W> inline uint64_t differing(const W* a, const W* b) {
    uint64_t mask = 0;
    constexpr unsigned kEach = 64 / sizeof(W);
    for (unsigned i = 0; i < sizeof(W); ++i) {
        const __m512i x = _mm512_loadu_si512(a + i * kEach), y = _mm512_loadu_si512(b + i * kEach);
        uint64_t part;
        if constexpr (sizeof(W) == 1) part = _mm512_cmpneq_epi8_mask(x, y);
        if constexpr (sizeof(W) == 2) part = _mm512_cmpneq_epi16_mask(x, y);
        if constexpr (sizeof(W) == 4) part = _mm512_cmpneq_epi32_mask(x, y);
        if constexpr (sizeof(W) == 8) part = _mm512_cmpneq_epi64_mask(x, y);
        mask |= part << (i * kEach % 64);
    }
    return mask;
}

#elif defined(WATERFILL_ISA_avx2)

inline uint64_t movemask(__m256i low, __m256i high) {
    return uint32_t(_mm256_movemask_epi8(low)) | uint64_t(uint32_t(_mm256_movemask_epi8(high))) << 32;
}

struct Exponents {
    __m256i low, high;
    uint64_t at_least(uint8_t least) const {
        const __m256i bound = _mm256_set1_epi8(char(least));
        return movemask(_mm256_cmpeq_epi8(_mm256_max_epu8(low, bound), low), _mm256_cmpeq_epi8(_mm256_max_epu8(high, bound), high));
    }
};

template <class W> inline Exponents exponents(const W* words, const Words& how) {
    alignas(32) uint8_t bytes[kGroup];
    exponents_of(words, how, bytes);
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)), _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes + 32))};
}

template <class W> inline uint64_t differing(const W* a, const W* b) {
    alignas(32) uint8_t same[kGroup];
    for (unsigned i = 0; i < kGroup; ++i) same[i] = a[i] == b[i] ? 0xFF : 0;
    return ~movemask(_mm256_load_si256(reinterpret_cast<const __m256i*>(same)), _mm256_load_si256(reinterpret_cast<const __m256i*>(same + 32)));
}

#else

template <class W> inline uint64_t differing(const W* a, const W* b) {
    uint64_t mask = 0;
    for (unsigned i = 0; i < kGroup; i += 8) {
        uint64_t bytes = 0;
        for (unsigned j = 0; j < 8; ++j) bytes |= uint64_t(a[i + j] != b[i + j]) << (8 * j);
        mask |= (bytes * 0x0102040810204080u >> 56) << i;  // one bit of each byte, side by side
    }
    return mask;
}

#endif
