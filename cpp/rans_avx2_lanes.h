// Included where AVX2 is on: eight lanes of rANS at a time, wherever their tables come from.

// For each 8-bit mask of lanes in need of a word: which of the next eight words each takes.
struct Expansions {
    uint64_t words[256];
    constexpr Expansions() : words() {
        for (unsigned mask = 0; mask < 256; ++mask) {
            uint64_t next = 0;
            for (unsigned lane = 0; lane < 8; ++lane)
                if (mask >> lane & 1) words[mask] |= next++ << (8 * lane);
        }
    }
};
constexpr Expansions kExpansions{};

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline __m256i below_lower(__m256i x) { return _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256()); }

// Eight lanes take the words they need from the stream, in lane order.
inline __m256i refill(__m256i x, __m256i low, const uint8_t*& at) {
    const unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kExpansions.words[mask])));
    const __m256i fed = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(words, order));
    at += 2 * size_t(__builtin_popcount(mask));
    return _mm256_blendv_epi8(x, fed, low);
}

// From the two candidate entries to the next state; returns the chosen entry.
template <unsigned kBits = kBucketBits> inline __m256i advance(__m256i& x, __m256i primary, __m256i alias) {
    const __m256i place = _mm256_slli_epi32(x, 32 - kBits);
    const __m256i second = _mm256_cmpeq_epi32(_mm256_max_epu32(place, primary), place);
    const __m256i entry = _mm256_blendv_epi8(primary, alias, second);
    const __m256i bias = _mm256_and_si256(_mm256_srai_epi32(alias, kBiasShift), second);
    const __m256i offset = _mm256_add_epi32(_mm256_and_si256(x, _mm256_set1_epi32((1 << kBits) - 1)), bias);
    const __m256i frequency = _mm256_and_si256(entry, _mm256_set1_epi32(kFrequencyMask));
    x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(x, kScaleBits)), offset);
    return entry;
}

inline __m256i symbols_of(__m256i entry) {
    return _mm256_and_si256(_mm256_srli_epi32(entry, kSymbolShift), _mm256_set1_epi32(kBuckets - 1));
}
