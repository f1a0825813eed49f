// Keys and values of the blocks to come, asked for a few rows at a time between other work, so that memory is never
// idle: for a few queries reading them is all that takes time. Block by block, keys before values, as they are used.
#pragma once

#include "attention_runs.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

struct KeyStream {
  const AttentionArgs& a;
  int64_t row, g, heads;
  int64_t element_bytes, row_bytes;
  int64_t size, last;                                             // keys of a block; one past the last key
  int64_t then_row, then_g, then_heads, then_first, then_number;  // the first block of the next item
  const char *at = nullptr, *begin = nullptr;                     // of the piece of this head
  int64_t left = 0, stride = 0;
  int64_t piece = 0, more = 0, head_stride = 0;  // rows of each head's piece, and heads to come
  const char* later = nullptr;                   // the same head's piece of a later block, in another page; or null
  int64_t limit = 0;                             // blocks from this key on are too far ahead
  int64_t block = 0, asked = 0;                  // what is being asked for, and up to where it lies one after the other
  bool on_values = false, turned = false;        // turned: to the next item
  bool done = false;                             // all has been asked for that this block may

  // `was_asked`: the first block was asked for already.
  void start(int64_t j0, bool was_asked) {
    block = asked = j0;
    limit = j0 + 3 * size;
    on_values = was_asked || j0 >= last;
    if (on_values) {
      asked = end_of(j0);
    } else {
      begin_piece();
    }
  }

  int64_t end_of(int64_t j0) const {
    const int64_t end = (j0 / size + 1) * size;
    return end < last ? end : last;
  }

  // The rest of a block, or what of it lies in one page.
  void begin_piece() {
    const KeyPlace p = key_place(a, row, asked);
    const int64_t rest = end_of(block) - asked;
    const char* pool = (const char*)(on_values ? a.v : a.k);
    piece = left = rest < p.left ? rest : p.left;
    begin = at = pool + (on_values ? value_offset(a, g, p) : key_offset(a, g, p)) * element_bytes;
    stride = (on_values ? a.v_ss : a.k_ss) * element_bytes;
    head_stride = (on_values ? a.v_sh : a.k_sh) * element_bytes;
    more = heads - 1;
    later = nullptr;
    if (a.pages.table && asked + kKeyBlock < last) {
      const KeyPlace then = key_place(a, row, asked + kKeyBlock);
      later = pool + (on_values ? value_offset(a, g, then) : key_offset(a, g, then)) * element_bytes;
    }
    touch_later();
    asked += left;
    if (a.pages.k_scale) {
      const float* scales = (on_values ? a.pages.v_scale : a.pages.k_scale) + scale_offset(a, g, p);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < left; i += kRun) __builtin_prefetch(scales + h * a.pages.page_size + i, 0, 2);
      }
    }
  }

  // Pages lie apart, and the first line of each waits for its translation, so that of a block later is asked for now:
  // 1.10 times as fast (16 rows of 2048 keys in pages of 16, 2 cores of Granite Rapids, 2026-11-25).
  void touch_later() {
    if (later) __builtin_prefetch(later, 0, 2);
  }

  void next_head() {
    --more;
    begin += head_stride;
    at = begin;
    left = piece;
    if (later) later += head_stride;
    touch_later();
  }

  bool advance() {
    if (asked >= end_of(block)) {
      if (on_values) {
        const int64_t next = end_of(block);
        if (next >= last && then_number > 0) {
          turn_to_next_item();
          return true;
        }
        if (next >= last || next >= limit) return false;
        block = next;
      }
      on_values = !on_values;
      asked = block;
    }
    begin_piece();
    return true;
  }

  void look_ahead_of(int64_t j0) {
    done = false;
    if (!turned) limit = j0 + 3 * size;
  }

  void turn_to_next_item() {
    turned = true;
    row = then_row;
    g = then_g;
    heads = then_heads;
    block = asked = then_first;
    last = then_first + then_number;
    limit = last + size;
    then_number = 0;
    on_values = false;
    begin_piece();
  }

  // Asks for the next row. In line, and what seldom happens apart and told so: around a call every vector register has
  // to be saved, and callers have all of them full.
  __attribute__((always_inline)) void ask_row() {
    if (__builtin_expect(left == 0, 0) && (done || !begin_more())) return;
    for (int64_t d = 0; d < row_bytes; d += 64) __builtin_prefetch(at + d, 0, 2);
    at += stride;
    --left;
  }
  __attribute__((noinline, cold)) bool begin_more() {
    if (more > 0) {
      next_head();
      return true;
    }
    done = !advance();
    return !done;
  }

  // Asks for n rows. Those that lie one after the other are counted in registers: ask_row waits for what the one before
  // it stored.
  __attribute__((always_inline)) void rows(int n) {
    while (n > 0) {
      if (__builtin_expect(left == 0, 0) && (done || !begin_more())) return;
      const int64_t now = left < n ? left : n, by = stride;
      const char* row = at;
      for (int64_t i = 0; i < now; ++i, row += by) {
        for (int64_t d = 0; d < row_bytes; d += 64) __builtin_prefetch(row + d, 0, 2);
      }
      at = row;
      left -= now;
      n -= int(now);
    }
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
