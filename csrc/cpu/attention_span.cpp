#include "attention_span.h"

#include <cstring>

namespace qwenopt {
namespace {

// Additive masks mean "not visible" by -inf or by the smallest number of their type.
constexpr float kHidden = -1e30f;

bool seen(uint8_t m) { return m != 0; }
bool seen(float m) { return !(m < kHidden); }
bool seen(bf16 m) {
  const uint32_t bits = uint32_t(m.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return seen(value);
}
bool seen(fp16 m) { return m.bits != 0xfbff && m.bits != 0xfc00; }

bool eight_zeros(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word == 0;
}

// First visible key in [begin, end), or end.
template <class M>
int64_t first_seen(const M* mask, int64_t stride, int64_t begin, int64_t end) {
  int64_t j = begin;
  if constexpr (sizeof(M) == 1) {
    if (stride == 1) {
      while (j + 8 <= end && eight_zeros(mask + j)) j += 8;
    }
  }
  while (j < end && !seen(mask[j * stride])) ++j;
  return j;
}

// One past the last visible key in [begin, end), or begin.
template <class M>
int64_t last_seen(const M* mask, int64_t stride, int64_t begin, int64_t end) {
  int64_t j = end;
  if constexpr (sizeof(M) == 1) {
    if (stride == 1) {
      while (j - 8 >= begin && eight_zeros(mask + j - 8)) j -= 8;
    }
  }
  while (j > begin && !seen(mask[(j - 1) * stride])) --j;
  return j;
}

// Widens `span` by what one mask row shows below `limit`.
void widen(const uint8_t* mask, int64_t stride, int64_t limit, KeySpan* span) {
  // What the span already covers is not looked at again.
  const bool empty = span->last <= span->first;
  const int64_t first = first_seen(mask, stride, 0, empty || span->first > limit ? limit : span->first);
  if (empty && first < limit) *span = {first, last_seen(mask, stride, first, limit)};
  if (empty) return;
  if (first < span->first && first < limit) span->first = first;
  if (limit > span->last) span->last = last_seen(mask, stride, span->last, limit);
}

template <class M>
void widen(const M* mask, int64_t stride, int64_t limit, KeySpan* span) {
  const bool empty = span->last <= span->first;
  int64_t first = first_seen(mask, stride, 0, limit), last = limit;
  if (first < limit) {
    last = last_seen(mask, stride, first, limit);
  } else {
    first = 0;  // all hidden, but by finite numbers they may still weigh against each other: the row needs them all
  }
  span->first = empty || first < span->first ? first : span->first;
  span->last = empty || last > span->last ? last : span->last;
}

template <class M>
KeySpan scan(const AttentionArgs& a, int64_t b, int64_t h0, int64_t h1, int64_t q0, int64_t q1) {
  KeySpan span{0, 0};
  int64_t least = a.L;  // the first key that is not behind the window of every query
  for (int64_t s = q0; s < q1; ++s) {
    int64_t limit = a.L, first = 0;
    if (a.is_causal && s + 1 < limit) limit = s + 1;
    if (a.q_positions && a.q_positions[s] + 1 < limit) limit = a.q_positions[s] + 1;
    if (a.q_positions && a.pages.window > 0) first = a.q_positions[s] + 1 - a.pages.window;
    if (limit <= 0 || first >= limit) continue;
    if (first < least) least = first;
    if (a.mask_kind == kNoMask) {
      if (limit > span.last) span.last = limit;
      continue;
    }
    for (int64_t h = h0; h < h1; ++h) {
      widen((const M*)a.mask + b * a.m_sb + h * a.m_sh + s * a.m_ss, a.m_sl, limit, &span);
    }
  }
  if (span.first < least) span.first = least < 0 ? 0 : least;
  return span;
}

}  // namespace

KeySpan visible_span(const AttentionArgs& a, int64_t b, int64_t h0, int64_t h1, int64_t q0, int64_t q1) {
  if (a.m_sh == 0) h1 = h0 + 1;
  if (a.mask_kind == kFloatMask) return scan<float>(a, b, h0, h1, q0, q1);
  if (a.mask_kind == kFp16Mask) return scan<fp16>(a, b, h0, h1, q0, q1);
  if (a.mask_kind == kBf16Mask) return scan<bf16>(a, b, h0, h1, q0, q1);
  return scan<uint8_t>(a, b, h0, h1, q0, q1);
}

}  // namespace qwenopt
