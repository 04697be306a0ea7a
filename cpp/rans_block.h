// Included by the kernels that decode rANS blocks, inside their namespace: the words of a block and
// the states of its lanes, whatever is done with the symbols.

// Where the next word is read. A row may begin only while `at <= limit`, so a row's reads need no
// check of their own.
struct Cursor {
    const uint8_t* at;
    const uint8_t* limit;
};

// The cursor walks the words as they lie while a whole row may be read unchecked, then a
// zero-padded copy of the last few, so that nothing outside is ever touched.
class BlockReader {
public:
    // A row reads at most `row_words` words; `tail` has room for twice as many, and 64 bytes.
    BlockReader(const uint8_t* states, unsigned n_states, const uint8_t* words, size_t n_words, size_t row_words, uint8_t* tail)
        : n_states_(n_states), end_(words + 2 * n_words), row_words_(row_words), tail_(tail) {
        for (unsigned i = 0; i < kMaxLanes; ++i) x_[i] = kLower;
        std::memcpy(x_, states, 4 * size_t(n_states));
        cursor_.at = words;
        if (n_words > row_words_) {
            cursor_.limit = end_ - 2 * row_words_;
        } else {
            begin_tail();
        }
    }

    bool low_state() const {
        for (unsigned i = 0; i < n_states_; ++i)
            if (x_[i] < kLower) return true;
        return false;
    }

    // decode_rows(states, cursor, panel) -> rows done; panel.advance(rows) moves it on.
    template <class Panel, class Rows> bool decode(Panel panel, Rows decode_rows) {
        while (panel.rows) {
            panel.advance(decode_rows(x_, cursor_, panel));
            if (cursor_.at > cursor_.limit) {
                if (in_tail_) return false;
                begin_tail();
            }
        }
        return true;
    }

    Status end() const {
        if (!in_tail_) return Status::words_left;
        if (cursor_.at > cursor_.limit) return Status::words_short;
        if (cursor_.at < cursor_.limit) return Status::words_left;
        for (unsigned i = 0; i < n_states_; ++i)
            if (x_[i] != kLower) return Status::wrong_end;
        return Status::ok;
    }

private:
    void begin_tail() {
        const size_t left = size_t(end_ - cursor_.at);
        std::memset(tail_, 0, 4 * row_words_ + 64);
        if (left) std::memcpy(tail_, cursor_.at, left);
        cursor_.at = tail_;
        cursor_.limit = tail_ + left;
        in_tail_ = true;
    }

    unsigned n_states_;
    const uint8_t* end_;
    size_t row_words_;
    uint8_t* tail_;
    Cursor cursor_{};
    bool in_tail_ = false;
    alignas(64) uint32_t x_[kMaxLanes];
};
