// A key holds value and id such that keys are all different and the order of integers is the order asked for: what is
// kept does not depend on how the columns were cut. Most vectors are passed over by one comparison with the least value
// that was among the k largest when they were last sorted out.
#include "top_tokens.h"

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

constexpr int kVectors = 4;  // looked at together

template <class T>
uint64_t key_of(const T* row, int64_t id) {
  const float value = to_float(row[id]);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (value == 0.0f) bits = 0x80000000u;  // of either sign
  if (value != value) bits = 0xFFFFFFFFu;
  return uint64_t(bits) << 32 | uint32_t(~uint32_t(id));
}

int64_t id_of(uint64_t key) { return int64_t(uint32_t(~uint32_t(key))); }

void swap(uint64_t& a, uint64_t& b) {
  const uint64_t c = a;
  a = b;
  b = c;
}

// Puts one key where it belongs in descending order, larger ones before and smaller ones behind it; returns its place.
int64_t split(uint64_t* keys, int64_t n) {
  uint64_t &a = keys[0], &b = keys[n / 2], &last = keys[n - 1];
  swap(last, (a < b) == (b < last) ? b : (b < a) == (a < last) ? a : last);  // the median of the three
  int64_t place = 0;
  for (int64_t i = 0; i < n - 1; ++i) {  // without a branch, which would be guessed wrong every other time
    const uint64_t key = keys[i];
    keys[i] = keys[place];
    keys[place] = key;
    place += key > last;
  }
  swap(keys[place], last);
  return place;
}

// Brings the k largest to the front, the least of them last.
void select(uint64_t* keys, int64_t n, int64_t k) {
  int64_t begin = 0, end = n;
  while (end - begin > 1) {
    const int64_t place = begin + split(keys + begin, end - begin);
    if (place == k - 1) return;
    if (place < k) {
      begin = place + 1;
    } else {
      end = place;
    }
  }
}

void sort_descending(uint64_t* keys, int64_t n) {
  while (n > 16) {
    const int64_t place = split(keys, n), rest = n - place - 1;
    if (place < rest) {
      sort_descending(keys, place);
      keys += place + 1;
      n = rest;
    } else {
      sort_descending(keys + place + 1, rest);
      n = place;
    }
  }
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t key = keys[i];
    int64_t at = i;
    for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

// The k largest of the keys added, among up to 2k. Each time they are sorted out, as many columns have been seen again.
struct Best {
  uint64_t* keys;
  int64_t size, k;
  uint64_t bar;  // a key below it is not among them

  // Whether the bar was raised.
  bool add(uint64_t key) {
    if (key < bar) return false;
    keys[size++] = key;
    return size == 2 * k && keep();
  }

  bool keep() {
    if (size <= k) return false;
    select(keys, size, k);
    size = k;
    bar = keys[k - 1];
    return true;
  }
};

template <class T>
void scan(const T* row, int64_t begin, int64_t end, Best best) {
  int64_t i = begin;
  while (i < end && !best.add(key_of(row, i))) ++i;
  for (++i; i < end;) {
    const float least = to_float(row[id_of(best.bar)]);
    if (least != least) return;  // k NaNs, and what follows has higher ids
    const F bar = set1(least);
    bool raised = false;
    for (; i + kVectors * W <= end && !raised; i += kVectors * W) {
      uint32_t above[kVectors], any = 0;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) any |= above[v] = lanes_above(load(row + i + v * W), bar);
      if (any == 0) continue;
      for (int v = 0; v < kVectors; ++v) {
        for (uint32_t left = above[v]; left != 0; left &= left - 1) {
          raised |= best.add(key_of(row, i + v * W + __builtin_ctz(left)));
        }
      }
    }
    if (raised) continue;
    for (; i < end; ++i) best.add(key_of(row, i));
  }
  best.keep();
}

// Where the columns [begin, end) of `member`'s share of `row` lie; false when it has none.
bool piece(const TopTokensArgs& a, int64_t row, int member, int members, int64_t* begin, int64_t* end) {
  const int64_t count = a.R * a.V, first = count * member / members, last = count * (member + 1) / members;
  *begin = first > row * a.V ? first - row * a.V : 0;
  *end = last < (row + 1) * a.V ? last - row * a.V : a.V;
  return *begin < *end;
}

// A member's next piece is in the next row, a row's next piece the next member's: no two have one sum.
uint64_t* slot(const TopTokensArgs& a, int64_t row, int member) { return a.scratch + (row + member) * 2 * a.K; }

template <class T>
void write(const TopTokensArgs& a, int64_t row, const uint64_t* keys) {
  const T* logits = (const T*)a.logits + row * a.stride;
  T* values = (T*)a.values + row * a.K;
  for (int64_t k = 0; k < a.K; ++k) {
    a.ids[row * a.K + k] = id_of(keys[k]);
    values[k] = logits[id_of(keys[k])];
  }
}

}  // namespace

void top_tokens_scan(const TopTokensArgs& a, int member, int members) {
  const int64_t count = a.R * a.V;
  int64_t begin, end;
  for (int64_t row = count * member / members / a.V; row < a.R; ++row) {
    if (!piece(a, row, member, members, &begin, &end)) return;
    const Best best{slot(a, row, member), 0, a.K, 0};
    of_type(a.dtype, [&](auto type) { scan((const decltype(type)*)a.logits + row * a.stride, begin, end, best); });
  }
}

void top_tokens_merge(const TopTokensArgs& a, int64_t row0, int64_t row1, int members) {
  for (int64_t row = row0; row < row1; ++row) {
    Best best{nullptr, 0, a.K, 0};
    for (int member = 0; member < members; ++member) {
      int64_t begin, end;
      if (!piece(a, row, member, members, &begin, &end)) continue;
      uint64_t* keys = slot(a, row, member);
      const int64_t size = end - begin < a.K ? end - begin : a.K;
      if (best.keys == nullptr) {
        best.keys = keys;
        best.size = size;
      } else {
        for (int64_t k = 0; k < size; ++k) best.add(keys[k]);
      }
    }
    best.keep();
    sort_descending(best.keys, a.K);
    of_type(a.dtype, [&](auto type) { write<decltype(type)>(a, row, best.keys); });
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
