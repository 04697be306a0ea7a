// Included by coded_kernel.cpp, inside its namespace: the strings of bits of a block and the states of
// its lanes, whatever decodes rows of symbols from them.

// The bytes of half the strings as they are wanted; the last few are read from a copy that ends in zeros.
struct Bytes {
    const uint8_t* at;
    const uint8_t* limit;  // a row may begin only while at <= limit

    void begin(const uint8_t* first, size_t nbytes) {
        at = first;
        end_ = first + nbytes;
        in_tail_ = nbytes < kReach;
        limit = end_ - kReach;
        if (in_tail_) begin_tail();
    }

    // False where bytes run out.
    bool ready() {
        if (at <= limit) return true;
        if (in_tail_) return false;
        in_tail_ = true;
        begin_tail();
        return true;
    }

private:
    static constexpr size_t kReach = kHalfNbytes + 64;  // a row takes so many bytes at most, and looks at so many more

    void begin_tail() {
        const size_t left = size_t(end_ - at);
        std::memset(tail_, 0, sizeof(tail_));
        if (left) std::memcpy(tail_, at, left);
        at = tail_;
        limit = tail_ + left;
    }

    const uint8_t* end_;
    bool in_tail_;
    uint8_t tail_[3 * kReach];
};

struct Reader {
    alignas(64) uint8_t states[kLanes];
    alignas(64) uint64_t windows[kStrings];    // the next bits of each string ...
    alignas(64) uint64_t positions[kStrings];  // ... of which so many are used up, fewer than 8
    Bytes bytes[2];

    explicit Reader(const Block& block) {
        for (unsigned i = 0; i < kLanes; ++i) states[i] = block.states[i] & (kStates - 1);
        std::memset(positions, 0, sizeof(positions));
        for (int half = 0; half < 2; ++half) {
            bytes[half].begin(block.strings[half], block.n_strings[half]);
            std::memcpy(windows + half * kStrings / 2, bytes[half].at, kHalfNbytes);
            bytes[half].at += kHalfNbytes;
        }
    }

    // decode_rows(reader, tile) does some rows, and moves the tile on. False where bytes run out.
    template <class Tile, class Rows> bool decode(Tile tile, Rows decode_rows) {
        while (tile.rows) {
            if (!bytes[0].ready() || !bytes[1].ready()) return false;
            decode_rows(*this, tile);
        }
        return true;
    }

    bool at_end() const {
        for (uint8_t state : states)
            if (state) return false;
        return true;
    }
};
