// paged_attention of decoding: every query alone over its keys, with the heads of its group packed into one product.
//
// Keys are taken in runs of 16, straight from the pool into the fragments of matrix instructions (a run lies in one
// page). The runs of all queries, known on the device only, are cut into pieces of one length, so many that they fill
// the device and no more; a block takes a piece for one key/value head, and its warps every fourth run of that. Whoever
// is last of a query's pieces puts them together. Same lengths, same pieces: the same bits again.
#include "rows.cuh"

namespace qwenopt {

struct PagedAttentionArgs {
  const void* q;                   // [B, H, S, D]
  const void *k_pool, *v_pool;     // [pages, G, page_size, D]
  const float *k_scale, *v_scale;  // [pages, G, page_size], only with int8 pools
  const int32_t* table;            // [rows, width]
  const int32_t* q_starts;         // [rows + 1]; null: the rows are the batch
  const int64_t* q_positions;      // [S]; null: all keys of the table
  void* out;                       // [B, S, H, D], contiguous
  float* partial;                  // [blocks, G, H / G, D + 2]
  int32_t* done;                   // [B * S, G], zeros: pieces that are through
  int64_t B, H, G, S, rows, width, page_size;
  int64_t q_sb, q_sh, q_ss, kp_sp, kp_sg, kp_ss, vp_sp, vp_sg, vp_ss, table_stride;
  int64_t window, pieces;  // pieces: how many there should be; blocks are so many and one for each query
  double scale;
};

constexpr int kPagedWarps = 4, kPagedThreads = kPagedWarps * kWarp;
constexpr int kRunKeys = 16, kGroupRows = 16;
constexpr int64_t kLeastRuns = 2 * kPagedWarps;  // of a piece

// The keys that a query sees, [first, last), and the runs that they lie in.
struct Seen {
  int64_t first, last, run0, runs;

  QWENOPT_FN_MEMBER Seen(const PagedAttentionArgs& a, int64_t token) {
    const int64_t s = token % a.S, keys = a.width * a.page_size;
    const int64_t end = a.q_positions != nullptr ? a.q_positions[s] + 1 : keys;
    const bool windowed = a.window > 0 && a.q_positions != nullptr;
    const bool of_a_row = a.q_starts == nullptr || (s >= a.q_starts[0] && s < a.q_starts[a.rows]);
    first = windowed ? most(end - a.window, 0) : 0;
    last = of_a_row ? least(end, keys) : 0;
    run0 = first / kRunKeys;
    runs = last > first ? blocks_of(last, kRunKeys) - run0 : 0;
  }
};

// What a block does: runs begin..begin+count of a query, the `piece`-th of `pieces`, whose first block is `block0`.
struct Piece {
  int64_t token, row, begin, count, piece, pieces, block0;
  bool last;
};

QWENOPT_FN int64_t warp_total(int64_t x) {
#pragma unroll
  for (int n = kWarp / 2; n > 0; n /= 2) x += __shfl_xor_sync(kAllLanes, x, n);
  return x;
}

QWENOPT_FN int64_t row_of(const PagedAttentionArgs& a, int64_t token) {
  if (a.q_starts == nullptr) return token / a.S;
  int64_t low = 0, high = a.rows - 1;  // the last row that begins at or before the token
  while (low < high) {
    const int64_t mid = (low + high + 1) / 2;
    if (a.q_starts[mid] <= token) {
      low = mid;
    } else {
      high = mid - 1;
    }
  }
  return low;
}

// Found by one warp, from the lengths on the device. token is -1 where there is nothing to do.
QWENOPT_FN void find_piece(const PagedAttentionArgs& a, Piece& out) {
  const int64_t tokens = a.B * a.S;
  int64_t total = 0;
  for (int64_t t = lane_id(); t < tokens; t += kWarp) total += Seen(a, t).runs;
  const int64_t length = most(kLeastRuns, blocks_of(warp_total(total), a.pieces));
  if (lane_id() == 0) {
    out.token = -1;
    out.last = false;
  }
  __syncwarp();
  int64_t before = 0;
  for (int64_t t0 = 0; t0 < tokens && before <= int64_t(blockIdx.x); t0 += kWarp) {
    const int64_t t = t0 + lane_id(), runs = t < tokens ? Seen(a, t).runs : 0;
    const int mine = t < tokens ? int(most(1, blocks_of(runs, length))) : 0;
    const int upto = warp_scan(mine);
    const int64_t block0 = before + upto - mine, piece = int64_t(blockIdx.x) - block0;
    if (piece >= 0 && piece < mine) {
      out.token = t;
      out.row = row_of(a, t);
      out.piece = piece;
      out.pieces = mine;
      out.block0 = block0;
      out.begin = piece * length;
      out.count = least(length, runs - out.begin);
    }
    before += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
}

// Eight numbers of a pool as bfloat16.
QWENOPT_FN Words load8(const bf16* from) { return load16_once(from); }
QWENOPT_FN Words load8(const int8_t* from) {
  const WordsOf<2> codes = *reinterpret_cast<const WordsOf<2>*>(from);
  Words out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = codes.w[i / 2] >> i % 2 * 16;
    out.w[i] = bf16_pair(float(int8_t(two & 0xff)), float(int8_t(two >> 8 & 0xff)));
  }
  return out;
}

// What a warp, a piece or a query has: of rows r and r + 8 of the group, the largest score, the sum, and the values.
// Tile 8 h + j of the values has columns 64 h + 8 n + j: eight neighbours of a row of the pool are one lane's.
template <int D>
struct Softmax {
  float top[2] = {-kLow, -kLow}, sum[2] = {0.0f, 0.0f};
  float values[D / 8][4] = {};
  static constexpr float kLow = 1.0e38f;  // instead of an infinity: the difference of two is 0
};

template <int D>
struct Meet {
  float top[kPagedWarps][kGroupRows], sum[kPagedWarps][kGroupRows], values[kPagedWarps][kGroupRows][D];
};

template <int D>
QWENOPT_FN void load_queries(const PagedAttentionArgs& a, const Piece& p, int64_t g, uint32_t (&q)[D / 16][4]) {
  const int r = lane_id() / 4, c = lane_id() % 4 * 8;
  const int64_t group = a.H / a.G;
  const bf16* from = static_cast<const bf16*>(a.q) + p.token / a.S * a.q_sb + p.token % a.S * a.q_ss + c;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const Words low = r < group ? load16(from + (g * group + r) * a.q_sh + i * 32) : Words{};
    const Words high = r + 8 < group ? load16(from + (g * group + r + 8) * a.q_sh + i * 32) : Words{};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      q[2 * i + n][0] = low.w[2 * n];
      q[2 * i + n][1] = high.w[2 * n];
      q[2 * i + n][2] = low.w[2 * n + 1];
      q[2 * i + n][3] = high.w[2 * n + 1];
    }
  }
}

// One run of keys into the sums.
template <int D, class Pool>
QWENOPT_FN void add_run(const PagedAttentionArgs& a, const Piece& p, const Seen& seen, int64_t g, int64_t run,
                        const uint32_t (&q)[D / 16][4], Softmax<D>& own) {
  constexpr bool kCoded = sizeof(Pool) == 1;
  const int r = lane_id() / 4, c = lane_id() % 4;
  const int64_t key0 = run * kRunKeys, page = a.table[p.row * a.table_stride + key0 / a.page_size];
  const int64_t place = key0 % a.page_size;
  const Pool* k = static_cast<const Pool*>(a.k_pool) + page * a.kp_sp + g * a.kp_sg + place * a.kp_ss + 8 * c;
  const Pool* v = static_cast<const Pool*>(a.v_pool) + page * a.vp_sp + g * a.vp_sg + place * a.vp_ss + 8 * r;
  const int64_t scales = (page * a.G + g) * a.page_size + place;
  Words keys[2][D / 32], values[D / 64][4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) keys[t][i] = load8(k + (8 * t + r) * a.kp_ss + i * 32);
  }
#pragma unroll
  for (int h = 0; h < D / 64; ++h) {
#pragma unroll
    for (int n = 0; n < 4; ++n) values[h][n] = load8(v + (n / 2 * 8 + 2 * c + n % 2) * a.vp_ss + h * 64);
  }
  float s[2][4] = {};
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      mma_bf16(s[t], q[2 * i], keys[t][i].w[0], keys[t][i].w[1]);
      mma_bf16(s[t], q[2 * i + 1], keys[t][i].w[2], keys[t][i].w[3]);
    }
  }
  // Places that the query does not see hold anything, NaN too: their scores and values are replaced, not multiplied.
  const float scale = float(a.scale * 1.4426950408889634);
  float weight[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int at = 8 * t + 2 * c + n;
      const bool visible = key0 + at >= seen.first && key0 + at < seen.last;
      const float factor = kCoded ? scale * a.k_scale[scales + at] : scale;
      weight[t][n] = !visible ? 0.0f : kCoded ? a.v_scale[scales + at] : 1.0f;
      s[t][n] = visible ? s[t][n] * factor : -Softmax<D>::kLow;
      s[t][n + 2] = visible ? s[t][n + 2] * factor : -Softmax<D>::kLow;
      if (!visible) {
#pragma unroll
        for (int h = 0; h < D / 64; ++h) values[h][2 * t + n] = Words{};
      }
    }
  }
  uint32_t probs[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    top = fmaxf(top, own.top[half]);
    const float shrink = exp2f(own.top[half] - top);
    own.top[half] = top;
    own.sum[half] *= shrink;
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
      own.values[t][2 * half] *= shrink;
      own.values[t][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float first = exp2f(s[t][2 * half] - top), second = exp2f(s[t][2 * half + 1] - top);
      own.sum[half] += first + second;
      probs[2 * t + half] = bf16_pair(first * weight[t][0], second * weight[t][1]);
    }
  }
#pragma unroll
  for (int h = 0; h < D / 64; ++h) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int word = j / 2;
      const uint32_t select = j % 2 ? 0x7632 : 0x5410;
      const uint32_t b0 = __byte_perm(values[h][0].w[word], values[h][1].w[word], select);
      const uint32_t b1 = __byte_perm(values[h][2].w[word], values[h][3].w[word], select);
      mma_bf16(own.values[8 * h + j], probs, b0, b1);
    }
  }
}

template <int D>
QWENOPT_FN void give(Softmax<D>& own, Meet<D>& all) {
  const int r = lane_id() / 4, c = lane_id() % 4, w = warp_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = own.sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (c == 0) {
      all.top[w][r + 8 * half] = own.top[half];
      all.sum[w][r + 8 * half] = sum;
    }
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
      const int column = t / 8 * 64 + 16 * c + t % 8;
      all.values[w][r + 8 * half][column] = own.values[t][2 * half];
      all.values[w][r + 8 * half][column + 8] = own.values[t][2 * half + 1];
    }
  }
}

template <int D, class Pool>
QWENOPT_FN void paged_attention(const PagedAttentionArgs& a) {
  using All = Meet<D>;
  QWENOPT_SHARED(Piece, p);
  QWENOPT_SHARED(All, all);
  if (warp_id() == 0) find_piece(a, p);
  __syncthreads();
  if (p.token < 0) return;
  const int64_t g = blockIdx.y, group = a.H / a.G;
  {
    const Seen seen(a, p.token);
    uint32_t q[D / 16][4];
    load_queries<D>(a, p, g, q);
    Softmax<D> own;
    const int64_t begin = seen.run0 + p.begin;
    for (int64_t run = begin + warp_id(); run < begin + p.count; run += kPagedWarps) {
      add_run<D, Pool>(a, p, seen, g, run, q, own);
    }
    give<D>(own, all);
  }
  __syncthreads();
  // Column d of a row: the warps of this piece, then, by the last block, all pieces.
  bf16* out = static_cast<bf16*>(a.out) + (p.token * a.H + g * group) * D;
  constexpr int kSlot = D + 2;
  for (int i = int(threadIdx.x); i < group * D; i += kPagedThreads) {
    const int r = i / D, d = i % D;
    float top = all.top[0][r], sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 1; w < kPagedWarps; ++w) top = fmaxf(top, all.top[w][r]);
#pragma unroll
    for (int w = 0; w < kPagedWarps; ++w) {
      const float shrink = exp2f(all.top[w][r] - top);
      sum += all.sum[w][r] * shrink;
      value += all.values[w][r][d] * shrink;
    }
    if (p.pieces == 1) {
      out[i] = from_float<bf16>(p.count > 0 ? value / sum : 0.0f);
    } else {
      float* slot = a.partial + ((int64_t(blockIdx.x) * a.G + g) * group + r) * kSlot;
      slot[d] = value;
      if (d == 0) {
        slot[D] = top;
        slot[D + 1] = sum;
      }
    }
  }
  if (p.pieces == 1) return;
  __threadfence();
  __syncthreads();
  int32_t* done = a.done + p.token * a.G + g;
  if (threadIdx.x == 0) p.last = atomicAdd(done, int32_t(1)) == p.pieces - 1;
  __syncthreads();
  if (!p.last) return;
  __threadfence();
  for (int i = int(threadIdx.x); i < group * D; i += kPagedThreads) {
    const int r = i / D, d = i % D;
    const int64_t step = a.G * group * kSlot;
    const float* slot = a.partial + ((p.block0 * a.G + g) * group + r) * kSlot;
    float top = slot[D], sum = 0.0f, value = 0.0f;
    for (int64_t n = 1; n < p.pieces; ++n) top = fmaxf(top, slot[n * step + D]);
    for (int64_t n = 0; n < p.pieces; ++n) {
      const float shrink = exp2f(slot[n * step + D] - top);
      sum += slot[n * step + D + 1] * shrink;
      value += slot[n * step + d] * shrink;
    }
    out[i] = from_float<bf16>(value / sum);
  }
}

QWENOPT_KERNEL(paged_attention_bfloat16_64, PagedAttentionArgs, kPagedThreads, paged_attention<64, bf16>(a))
QWENOPT_KERNEL(paged_attention_bfloat16_128, PagedAttentionArgs, kPagedThreads, paged_attention<128, bf16>(a))
QWENOPT_KERNEL(paged_attention_int8_64, PagedAttentionArgs, kPagedThreads, paged_attention<64, int8_t>(a))
QWENOPT_KERNEL(paged_attention_int8_128, PagedAttentionArgs, kPagedThreads, paged_attention<128, int8_t>(a))

}  // namespace qwenopt
