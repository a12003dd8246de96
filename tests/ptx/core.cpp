// Executes decoded PTX on a CPU: one block at a time, warps of 32 lanes in lock step, lowest program counter first.
// Checks: bounds and alignment of every access; races in shared memory between two barriers; reads of the target of a
// copy before its wait; writes under a wgmma in flight; a missing fence.proxy.async; bytes that two programs write.
// executor.py parses and decodes. The names between OPS and END are the opcodes; it reads them from here.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>
// clang-format off
enum Code {
//OPS
ADD_F32, SUB_F32, MUL_F32, FMA_RN_F32, FMA_RN_FTZ_F32, ADD_S32, ADD_S64, SUB_S32, SUB_S64, MUL_LO_S32, MUL_LO_S64,
MUL_WIDE_U16, MUL_WIDE_S32, MUL_WIDE_U32, MAD_WIDE_S32, MAD_WIDE_U32, MAD_LO_S64, MAD_LO_S32, MUL_HI_U32, DIV_S32,
DIV_U32, DIV_S64, DIV_U64, REM_S32, REM_U32, REM_S64, REM_U64, MIN_S32, MAX_S32, MIN_U32, MAX_U32, MIN_S64, MAX_S64,
MIN_F32, MAX_F32, AND_B32, OR_B32, XOR_B32, NOT_B32, AND_B64, OR_B64, XOR_B64, AND_PRED, OR_PRED, XOR_PRED, NOT_PRED,
SHL_B16, SHL_B32, SHL_B64, SHR_U32, SHR_S32, SHR_U64, SHR_S64, BFE_U32, BFE_S32, NEG_F32, NEG_S32, ABS_F32, SETP_F32,
SETP_S32, SETP_U32, SETP_S64, SETP_U64, SELP_B32, SELP_B64, CVT_F32_BF16, CVT_RN_BF16_F32, CVT_RN_BF16X2_F32,
CVT_RN_F16_F32, CVT_F32_F16, CVT_RN_F16X2_F32, CVT_RN_F32_S32, CVT_RNA_TF32_F32, CVT_S64_S32, CVT_U64_U32,
CVT_U64_U16, CVT_U32_U64, CVT_U16_U32, MOV_32, MOV_64, MOV_PRED, PACK_16, UNPACK_16, PACK_32, UNPACK_32,
EX2_APPROX_F32, EX2_APPROX_FTZ_F32, LG2_APPROX_F32, SQRT_APPROX_F32, SQRT_APPROX_FTZ_F32, DIV_FULL_F32, LD_GLOBAL,
ST_GLOBAL, LD_SHARED, ST_SHARED, CP_ASYNC, CP_ASYNC_COMMIT_GROUP, CP_WAIT, BAR, BAR_WARP_SYNC, SHFL_BFLY, SHFL_IDX,
LDMATRIX, STMATRIX, MMA_BF16, MMA_F16, MMA_TF32, WGMMA, WGMMA_FENCE_SYNC_ALIGNED, WGMMA_COMMIT_GROUP_SYNC_ALIGNED,
WG_WAIT, FENCE_PROXY_ASYNC_SHARED_CTA, ELECT, POPC_B32, PRMT_B32, BRA, RET, MB_INIT, MB_INVAL, MB_EXPECT, MB_TRY,
TMA_2D,
//END
COUNT };
struct Op { int32_t code, a, b, c, pred, neg, off, nd; };  // a, b, c: modifiers; pred: slot or -1; off: of its operands
struct Range { uint64_t lo, hi; uint32_t* writers; int64_t writable; };  // a tensor, and who wrote each byte
struct TensorMap { uint64_t base; int64_t dims[2], stride, box[2], es, swizzle; };
enum { CNT, LANES_ON, SECTORS, BYTES, WAVES, IDEAL, NSTAT };
typedef uint32_t u32; typedef uint64_t u64; typedef int64_t i64; typedef int32_t i32;
struct Byte { u32 write_epoch, writers, read_epoch, readers, copies, products; i32 writer; u64 written_at; };
struct Copy { u32 dst; int n; unsigned char data[16]; };
struct Product { const Op* op; u64 da, db; bool keep; };
struct Bar { u32 addr; int count, arrived; i64 tx; int phase; };
struct Warp {
  int id, pc; u32 mask; bool done, waiting; std::vector<std::pair<int, u32>> other; u32* reg;
  std::vector<Copy> open; std::deque<std::vector<Copy>> groups;
  std::vector<Product> open_products; std::deque<std::vector<Product>> product_groups; u64 fenced; bool fence_seen;
};
// clang-format on
static const u32 BASE = 1024;
template <class To, class From>
static inline To bits(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline float f(u32 x) { return bits<float>(x); }
static inline u32 u(float x) { return bits<u32>(x); }
static inline float ftz(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
static inline u32 bf16(float x) {
  u32 v = u(x);
  if (x != x) return 0x7fff;
  return (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
static inline float half(uint16_t x) { return bits<_Float16>(x); }
static inline u32 tohalf(float x) { return x != x ? 0x7fff : bits<uint16_t>((_Float16)x); }
static inline float tf32(u32 x) { return f(x & 0xffffe000u); }

static inline u32 to_tf32(u32 x) { return (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & 0xffffe000u; }
// With `keep_nan` a NaN operand is the result, else the other operand is.
static inline float least(float a, float b, bool keep_nan) {
  if (a != a) return keep_nan ? a : b;
  if (b != b) return keep_nan ? b : a;
  return a < b ? a : b;
}
static inline u32 field(u32 x, u32 at, u32 length, bool sign) {
  if (!sign) return at > 31 ? 0 : length > 31 ? x >> at : x >> at & ((1ull << length) - 1);
  if (!length) return 0;
  u32 top = std::min(at + length - 1, 31u);
  i64 value = i64(i32(x << (31 - top))) >> (31 - top);
  return i32(value >> std::min(at, 31u));
}
static inline u32 permute(u64 bytes, u32 selector) {
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 q = selector >> i * 4, byte = bytes >> (q & 7) * 8 & 255;
    if (q & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << i * 8;
  }
  return out;
}
// eq, ne, lt, le, gt, ge; the same, which hold where an operand is NaN too; num, nan.
template <class T>
static inline bool compare(int how, T x, T y) {
  bool nan = x != x || y != y, holds[] = {x == y, x < y || x > y, x < y, x <= y, x > y, x >= y};
  return how < 12 ? holds[how % 6] || (how > 5 && nan) : nan == (how == 13);
}

// clang-format off
struct Machine {
  const Op* ops; int num_ops; const i32* operands; const u32* initial; int num_slots; const i32* spec; int num_warps;
  u32 shared; int gx, gy, gz; Range* ranges; int num_ranges; TensorMap* maps; i64* stats; char* message;
  int message_size, reverse;
  int errors = 0, lastrange = 0; u32 cta[3], ctaid, epoch; u64 now, polls = 0;
  std::vector<unsigned char> memory; std::vector<Byte> state; std::vector<Warp> warps; std::vector<u32> regs;
  std::vector<Bar> bars;
  // clang-format on

  void say(bool fatal, int pc, int w, int lane, const char* fmt, ...) {
    char text[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (errors++ < 8 || fatal) {
      size_t used = strlen(message);
      if (used + 400 < (size_t)message_size)
        snprintf(message + used, message_size - used, "@%d block %u,%u warp %d lane %d: %s\n", pc, cta[0], cta[1], w,
                 lane, text);
    }
    if (fatal) throw std::runtime_error("fatal");
  }
  // ---- global memory
  Range* find(u64 a, int n, int pc, int w, int lane, const char* what) {
    Range* r = &ranges[lastrange];
    if (a >= r->lo && a + n <= r->hi) return r;
    for (int i = 0; i < num_ranges; i++)
      if (a >= ranges[i].lo && a + n <= ranges[i].hi) {
        lastrange = i;
        return &ranges[i];
      }
    int best = 0;
    u64 far = ~0ull;
    for (int i = 0; i < num_ranges; i++) {
      u64 d = a < ranges[i].lo ? ranges[i].lo - a : a + n - ranges[i].hi;
      if (d < far) far = d, best = i;
    }
    say(true, pc, w, lane, "%s of %d bytes outside every tensor: %lld bytes %s tensor #%d", what, n, (long long)far,
        a < ranges[best].lo ? "before" : "past the end of", best);
    return 0;
  }
  void sectors(i64* s, const u64* addr, u32 m, int n) {
    u64 list[64], first[32];
    int k = 0, j = 0;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) {
        first[j++] = addr[l];
        for (u64 x = addr[l] / 32; x <= (addr[l] + n - 1) / 32; x++) list[k++] = x;
      }
    std::sort(list, list + k);
    std::sort(first, first + j);
    s[SECTORS] += std::unique(list, list + k) - list;
    s[BYTES] += (std::unique(first, first + j) - first) * n;
  }
  void gread(u64 a, void* to, int n, int pc, int w, int lane) {
    if (a % n) say(true, pc, w, lane, "misaligned global load of %d bytes", n);
    Range* r = find(a, n, pc, w, lane, "load");
    if (r->writers)
      for (int i = 0; i < n; i++) {
        u32 s = r->writers[a - r->lo + i];
        if (s && s != ctaid + 1) {
          say(false, pc, w, lane, "reads tensor #%d where program %u wrote", int(r - ranges), s - 1);
          break;
        }
      }
    memcpy(to, (void*)a, n);
  }
  void gwrite(u64 a, const void* from, int n, int pc, int w, int lane) {
    if (a % n) say(true, pc, w, lane, "misaligned global store of %d bytes", n);
    Range* r = find(a, n, pc, w, lane, "store");
    if (!r->writable) say(true, pc, w, lane, "store into input tensor #%d", int(r - ranges));
    if (r->writers)
      for (int i = 0; i < n; i++) {
        u32& s = r->writers[a - r->lo + i];
        if (s && s != ctaid + 1) {
          say(false, pc, w, lane, "writes byte %lld of tensor #%d, which program %u wrote too", (long long)(a - r->lo),
              int(r - ranges), s - 1);
          break;
        }
        s = ctaid + 1;
      }
    memcpy((void*)a, from, n);
  }
  // ---- shared memory
  void inside(u32 a, int n, int pc, int w, int lane) {
    if (a % n) say(true, pc, w, lane, "misaligned shared access of %d bytes", n);
    if (a < BASE || a + n > BASE + shared)
      say(true, pc, w, lane, "shared address %d outside %u bytes", int(a - BASE), shared);
  }
  // `data`: the bytes to be written; warps that hold the same values may write them twice. Null: no two may.
  void swrite(u32 a, int n, int pc, int w, int lane, const unsigned char* data, bool landing = false) {
    for (u32 g = a; g < a + n; g++) {
      Byte& x = state[g];
      u32 me = 1u << w;
      if (x.write_epoch == epoch && (x.writers & ~me) && !(data && memory[g] == data[g - a]))
        say(false, pc, w, lane, "race: writes shared byte %d, which warps %#x wrote since the barrier", int(g - BASE),
            x.writers);
      if (x.read_epoch == epoch && (x.readers & ~me))
        say(false, pc, w, lane, "race: writes shared byte %d, which warps %#x read since the barrier", int(g - BASE),
            x.readers);
      if (x.products) say(false, pc, w, lane, "writes shared byte %d under a pending wgmma", int(g - BASE));
      if (x.copies && !landing) say(false, pc, w, lane, "writes shared byte %d under a pending copy", int(g - BASE));
      if (x.write_epoch != epoch) x.writers = 0;
      x.write_epoch = epoch;
      x.writers |= me;
      x.writer = w;
      x.written_at = now;
    }
  }
  void sread(u32 a, int n, int pc, int w, int lane, bool proxy = false) {
    for (u32 g = a; g < a + n; g++) {
      Byte& x = state[g];
      if (x.write_epoch == epoch && !(x.writers >> w & 1) && x.writer >= 0)
        say(false, pc, w, lane, "race: reads shared byte %d, which warps %#x wrote since the barrier", int(g - BASE),
            x.writers);
      if (x.copies)
        say(false, pc, w, lane, "reads shared byte %d before the copy into it was waited for", int(g - BASE));
      if (proxy && x.write_epoch && x.writer >= 0 && warps[w].fenced <= x.written_at &&
          warps[x.writer].fenced <= x.written_at)
        say(false, pc, w, lane, "wgmma reads shared byte %d with no fence.proxy.async since it was written",
            int(g - BASE));
      if (x.read_epoch != epoch) x.read_epoch = epoch, x.readers = 0;
      x.readers |= 1u << w;
    }
  }
  void waves(i64* s, const u32* addr, u32 m, int n) {
    int per = n <= 4 ? 32 : n == 8 ? 16 : 8, words = std::max(1, n / 4);
    for (int base = 0; base < 32; base += per) {
      u32 seen[32][32];
      int k[32] = {0}, most = 0;
      for (int l = base; l < base + per; l++)
        if (m >> l & 1)
          for (int i = 0; i < words; i++) {
            u32 word = addr[l] / 4 + i, b = word & 31;
            int j = 0;
            while (j < k[b] && seen[b][j] != word) j++;
            if (j == k[b]) {
              seen[b][k[b]++] = word;
              most = std::max(most, k[b]);
            }
          }
      if (most) s[WAVES] += most, s[IDEAL]++;
    }
  }
  void land(Warp& w, std::vector<Copy>& g, int pc) {
    for (Copy& c : g) {
      for (u32 x = c.dst; x < c.dst + c.n; x++) state[x].copies--;
      swrite(c.dst, c.n, pc, w.id, 0, nullptr, true);
      memcpy(&memory[c.dst], c.data, c.n);
    }
  }
  // ---- wgmma
  u32 place(u64 d, int r, int k, int es, int trans) {
    u32 start = (d & 0x3fff) << 4, lbo = (d >> 16 & 0x3fff) << 4, sbo = (d >> 32 & 0x3fff) << 4, sw = d >> 62, a;
    u32 row = sw == 1 ? 128 : sw == 2 ? 64 : sw == 3 ? 32 : 16, per = row / es;
    if (!trans)
      a = sw ? start + r / 8 * sbo + r % 8 * row + k * es
             : start + r / 8 * sbo + k * es / 16 * lbo + r % 8 * 16 + k * es % 16;
    else
      a = sw ? start + r / per * lbo + k / 8 * sbo + k % 8 * row + r % per * es
             : start + r / 8 * sbo + k / 8 * lbo + k % 8 * 16 + r % 8 * 2;
    if (sw) a ^= ((a >> 7) & (sw == 1 ? 7 : sw == 2 ? 3 : 1)) << 4;
    return a;
  }
  float element(u32 a, int type) {
    u32 x = 0;
    memcpy(&x, &memory[a], type == 2 ? 4 : 2);
    return type == 2 ? tf32(x) : type == 0 ? f(x << 16) : half(x);
  }
  // a: n; b: type (0 bf16, 1 f16, 2 tf32) | A in registers << 4 | transA << 5 | transB << 6. Operands: D, A, B,
  // scale-d.
  void mark(Warp& w, const Product& g, int by, bool check, int pc) {
    int n = g.op->a, type = g.op->b & 15, es = type == 2 ? 4 : 2, K = type == 2 ? 8 : 16;
    auto one = [&](u32 a) {
      inside(a, es, pc, w.id, 0);
      for (u32 x = a; x < a + es; x++) state[x].products += by;
      if (check) sread(a, es, pc, w.id, 0, true);
    };
    for (int c = 0; c < n; c++)
      for (int k = 0; k < K; k++) one(place(g.db, c, k, es, g.op->b >> 6 & 1));
    if (!(g.op->b >> 4 & 1))
      for (int r = 0; r < 16; r++)
        for (int k = 0; k < K; k++) one(place(g.da, w.id % 4 * 16 + r, k, es, g.op->b >> 5 & 1));
  }
  void multiply(Warp& w, const Product& g, int pc) {
    const Op& op = *g.op;
    const i32* o = operands + op.off;
    int n = op.a, type = op.b & 15, es = type == 2 ? 4 : 2, K = type == 2 ? 8 : 16;
    static thread_local float A[16][16], B[16][256];
    static thread_local double S[256];
    mark(w, g, -1, true, pc);
    for (int k = 0; k < K; k++)
      for (int c = 0; c < n; c++) B[k][c] = element(place(g.db, c, k, es, op.b >> 6 & 1), type);
    if (op.b >> 4 & 1) fragment(w, o + n / 2, 4, type, A);
    else
      for (int r = 0; r < 16; r++)
        for (int k = 0; k < K; k++) A[r][k] = element(place(g.da, w.id % 4 * 16 + r, k, es, op.b >> 5 & 1), type);
    for (int r = 0; r < 16; r++) {
      for (int c = 0; c < n; c++) S[c] = 0;
      for (int k = 0; k < K; k++) {
        double x = A[r][k];
        for (int c = 0; c < n; c++) S[c] += x * B[k][c];
      }
      for (int c = 0; c < n; c++) {
        float* d = (float*)(w.reg + size_t(o[c / 8 * 4 + (r >= 8) * 2 + c % 2]) * 32) + (r % 8 * 4 + c % 8 / 2);
        *d = g.keep ? float(*d + S[c]) : float(S[c]);
      }
    }
  }
  // Of A: 4 registers; of B, transposed: 2.
  void fragment(Warp& w, const i32* o, int registers, int type, float (*A)[16]) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < registers; i++) {
        u32 x = w.reg[size_t(o[i]) * 32 + l];
        int r = registers == 4 ? l / 4 + (i & 1) * 8 : l / 4, high = registers == 4 ? i >> 1 : i;
        if (type == 2) A[r][l % 4 + high * 4] = tf32(x);
        else {
          int k = l % 4 * 2 + high * 8;
          A[r][k] = type == 0 ? f(x << 16) : half(x & 0xffff);
          A[r][k + 1] = type == 0 ? f(x & 0xffff0000u) : half(x >> 16);
        }
      }
  }
  void mma(Warp& w, const i32* o, int type) {  // D(4) A(4) B(2) C(4)
    float A[16][16], B[8][16], D[16][8];
    fragment(w, o + 4, 4, type, A);
    fragment(w, o + 8, 2, type, B);
    auto place = [&](int first, int r, int c) {
      return w.reg + size_t(o[first + (r >= 8) * 2 + c % 2]) * 32 + r % 8 * 4 + c / 2;
    };
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 8; c++) {
        double sum = 0;
        for (int k = 0; k < (type == 2 ? 8 : 16); k++) sum += double(A[r][k]) * B[c][k];
        D[r][c] = float(sum + f(*place(10, r, c)));
      }
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 8; c++) *place(0, r, c) = u(D[r][c]);
  }
  // ---- execution
  void all(Warp& w, u32 m, int pc) {
    if (m != ~0u) say(true, pc, w.id, 0, "a .aligned or .sync instruction with lanes %#x only", m);
  }
  Bar& barrier(u32 a, int pc, int w) {
    for (Bar& b : bars)
      if (b.addr == a) return b;
    say(true, pc, w, 0, "no mbarrier there");
    return bars[0];
  }
  void forget(u32 a) {
    bars.erase(std::remove_if(bars.begin(), bars.end(), [&](Bar& b) { return b.addr == a; }), bars.end());
  }
  void settle(Bar& b) {
    if (b.arrived >= b.count && b.tx == 0) b.phase ^= 1, b.arrived = 0;
  }

  void run(Warp& w) {  // until it ends or waits
    while (true) {
      if (w.other.size()) {
        size_t best = 0;
        for (size_t i = 1; i < w.other.size(); i++)
          if (w.other[i].first < w.other[best].first) best = i;
        if (!w.mask) {
          w.pc = w.other[best].first;
          w.mask = w.other[best].second;
          w.other.erase(w.other.begin() + best);
          continue;
        }
        if (w.other[best].first == w.pc) {
          w.mask |= w.other[best].second;
          w.other.erase(w.other.begin() + best);
          continue;
        }
        if (w.other[best].first < w.pc) {
          std::swap(w.pc, w.other[best].first);
          std::swap(w.mask, w.other[best].second);
        }
      }
      if (!w.mask) {
        w.done = true;
        return;
      }
      if (w.pc >= num_ops) say(true, w.pc, w.id, 0, "ran past the end");
      int pc = w.pc++;
      const Op& op = ops[pc];
      const i32* o = operands + op.off;
      u32* reg = w.reg;
      u32 m = w.mask;
      i64* s = stats + i64(pc) * NSTAT;
      s[CNT]++;
      now++;
      if (op.pred >= 0) {
        u32 p = reg[size_t(op.pred) * 32];
        m &= op.neg ? ~p : p;
      }
      s[LANES_ON] += __builtin_popcount(m);
      if (!m) continue;
      // clang-format off
#define R(i) (reg + size_t(o[i]) * 32)
#define F(i) ((float*)R(i))
#define I(i) ((i32*)R(i))
#define U6(i) ((u64*)R(i))
#define I6(i) ((i64*)R(i))
#define P(i) (*R(i))
// For every lane that is on; the first loop is the one that the compiler makes vector instructions of.
#define L(...) \
  if (m == ~0u) { for (int l = 0; l < 32; l++) { __VA_ARGS__; } } \
  else for (int l = 0; l < 32; l++) if (m >> l & 1) { __VA_ARGS__; } \
  break
#define SETP(T) { \
  T* a = (T*)R(1); T* b = (T*)R(2); u32 r = 0; \
  for (int l = 0; l < 32; l++) r |= u32(compare(op.a, a[l], b[l])) << l; \
  P(0) = (P(0) & ~m) | (r & m); break; }
      switch (op.code) {
        case ADD_F32: L(F(0)[l] = F(1)[l] + F(2)[l]);
        case SUB_F32: L(F(0)[l] = F(1)[l] - F(2)[l]);
        case MUL_F32: L(F(0)[l] = F(1)[l] * F(2)[l]);
        case FMA_RN_F32: L(F(0)[l] = __builtin_fmaf(F(1)[l], F(2)[l], F(3)[l]));
        case FMA_RN_FTZ_F32: L(F(0)[l] = ftz(__builtin_fmaf(ftz(F(1)[l]), ftz(F(2)[l]), ftz(F(3)[l]))));
        case ADD_S32: L(R(0)[l] = R(1)[l] + R(2)[l]);
        case ADD_S64: L(U6(0)[l] = U6(1)[l] + U6(2)[l]);
        case SUB_S32: L(R(0)[l] = R(1)[l] - R(2)[l]);
        case SUB_S64: L(U6(0)[l] = U6(1)[l] - U6(2)[l]);
        case MUL_LO_S32: L(R(0)[l] = R(1)[l] * R(2)[l]);
        case MUL_WIDE_U16: L(R(0)[l] = (R(1)[l] & 0xffff) * (R(2)[l] & 0xffff));
        case MUL_LO_S64: L(U6(0)[l] = U6(1)[l] * U6(2)[l]);
        case MUL_WIDE_S32: L(I6(0)[l] = i64(I(1)[l]) * I(2)[l]);
        case MUL_WIDE_U32: L(U6(0)[l] = u64(R(1)[l]) * R(2)[l]);
        case MAD_WIDE_S32: L(I6(0)[l] = i64(I(1)[l]) * I(2)[l] + I6(3)[l]);
        case MAD_WIDE_U32: L(U6(0)[l] = u64(R(1)[l]) * R(2)[l] + U6(3)[l]);
        case MAD_LO_S64: L(U6(0)[l] = U6(1)[l] * U6(2)[l] + U6(3)[l]);
        case MAD_LO_S32: L(R(0)[l] = R(1)[l] * R(2)[l] + R(3)[l]);
        case MUL_HI_U32: L(R(0)[l] = u64(R(1)[l]) * R(2)[l] >> 32);
#define DIV(T, Q) { \
  T* d = (T*)R(0); T* a = (T*)R(1); T* b = (T*)R(2); \
  for (int l = 0; l < 32; l++) if (m >> l & 1) { \
    if (b[l] == 0) say(true, pc, w.id, l, "divides by zero"); \
    d[l] = a[l] Q b[l]; } \
  break; }
        case DIV_S32: DIV(i32, /)
        case DIV_U32: DIV(u32, /)
        case DIV_S64: DIV(i64, /)
        case DIV_U64: DIV(u64, /)
        case REM_S32: DIV(i32, %)
        case REM_U32: DIV(u32, %)
        case REM_S64: DIV(i64, %)
        case REM_U64: DIV(u64, %)
        case MIN_S32: L(I(0)[l] = std::min(I(1)[l], I(2)[l]));
        case MAX_S32: L(I(0)[l] = std::max(I(1)[l], I(2)[l]));
        case MIN_U32: L(R(0)[l] = std::min(R(1)[l], R(2)[l]));
        case MAX_U32: L(R(0)[l] = std::max(R(1)[l], R(2)[l]));
        case MIN_S64: L(I6(0)[l] = std::min(I6(1)[l], I6(2)[l]));
        case MAX_S64: L(I6(0)[l] = std::max(I6(1)[l], I6(2)[l]));
        case MIN_F32: L(F(0)[l] = least(F(1)[l], F(2)[l], op.a));
        case MAX_F32: L(F(0)[l] = -least(-F(1)[l], -F(2)[l], op.a));
        case AND_B32: L(R(0)[l] = R(1)[l] & R(2)[l]);
        case OR_B32: L(R(0)[l] = R(1)[l] | R(2)[l]);
        case XOR_B32: L(R(0)[l] = R(1)[l] ^ R(2)[l]);
        case NOT_B32: L(R(0)[l] = ~R(1)[l]);
        case AND_B64: L(U6(0)[l] = U6(1)[l] & U6(2)[l]);
        case OR_B64: L(U6(0)[l] = U6(1)[l] | U6(2)[l]);
        case XOR_B64: L(U6(0)[l] = U6(1)[l] ^ U6(2)[l]);
        case AND_PRED: P(0) = (P(0) & ~m) | ((P(1) & P(2)) & m); break;
        case OR_PRED: P(0) = (P(0) & ~m) | ((P(1) | P(2)) & m); break;
        case XOR_PRED: P(0) = (P(0) & ~m) | ((P(1) ^ P(2)) & m); break;
        case NOT_PRED: P(0) = (P(0) & ~m) | (~P(1) & m); break;
        case MOV_PRED: P(0) = (P(0) & ~m) | (P(1) & m); break;
        case SHL_B16: L(R(0)[l] = R(2)[l] > 15 ? 0 : (R(1)[l] << R(2)[l]) & 0xffff);
        case SHL_B32: L(R(0)[l] = R(2)[l] > 31 ? 0 : R(1)[l] << R(2)[l]);
        case SHL_B64: L(U6(0)[l] = R(2)[l] > 63 ? 0 : U6(1)[l] << R(2)[l]);
        case SHR_U32: L(R(0)[l] = R(2)[l] > 31 ? 0 : R(1)[l] >> R(2)[l]);
        case SHR_S32: L(I(0)[l] = I(1)[l] >> std::min(R(2)[l], 31u));
        case SHR_U64: L(U6(0)[l] = R(2)[l] > 63 ? 0 : U6(1)[l] >> R(2)[l]);
        case SHR_S64: L(I6(0)[l] = I6(1)[l] >> std::min(R(2)[l], 63u));
        case BFE_U32: L(R(0)[l] = field(R(1)[l], R(2)[l] & 255, R(3)[l] & 255, false));
        case BFE_S32: L(R(0)[l] = field(R(1)[l], R(2)[l] & 255, R(3)[l] & 255, true));
        case NEG_F32: L(R(0)[l] = R(1)[l] ^ 0x80000000u);
        case ABS_F32: L(R(0)[l] = R(1)[l] & 0x7fffffffu);
        case NEG_S32: L(R(0)[l] = 0u - R(1)[l]);
        case SETP_F32: SETP(float)
        case SETP_S32: SETP(i32)
        case SETP_U32: SETP(u32)
        case SETP_S64: SETP(i64)
        case SETP_U64: SETP(u64)
        case SELP_B32: L(R(0)[l] = P(3) >> l & 1 ? R(1)[l] : R(2)[l]);
        case SELP_B64: L(U6(0)[l] = P(3) >> l & 1 ? U6(1)[l] : U6(2)[l]);
        case CVT_F32_BF16: L(R(0)[l] = R(1)[l] << 16);
        case CVT_RN_BF16_F32: L(R(0)[l] = bf16(F(1)[l]));
        case CVT_RN_BF16X2_F32: L(R(0)[l] = bf16(F(1)[l]) << 16 | bf16(F(2)[l]));
        case CVT_RN_F16_F32: L(R(0)[l] = tohalf(F(1)[l]));
        case CVT_F32_F16: L(F(0)[l] = half(R(1)[l]));
        case CVT_RN_F16X2_F32: L(R(0)[l] = tohalf(F(1)[l]) << 16 | tohalf(F(2)[l]));
        case CVT_RN_F32_S32: L(F(0)[l] = float(I(1)[l]));
        case CVT_RNA_TF32_F32: L(R(0)[l] = to_tf32(R(1)[l]));
        case CVT_S64_S32: L(I6(0)[l] = I(1)[l]);
        case CVT_U64_U32: L(U6(0)[l] = R(1)[l]);
        case CVT_U64_U16: L(U6(0)[l] = R(1)[l] & 0xffff);
        case CVT_U32_U64: L(R(0)[l] = u32(U6(1)[l]));
        case CVT_U16_U32: L(R(0)[l] = R(1)[l] & 0xffff);
        case MOV_32: L(R(0)[l] = R(1)[l]);
        case MOV_64: L(U6(0)[l] = U6(1)[l]);
        case PACK_16: L(R(0)[l] = (R(1)[l] & 0xffff) | R(2)[l] << 16);
        case UNPACK_16: L(u32 x = R(2)[l]; R(0)[l] = x & 0xffff; R(1)[l] = x >> 16);
        case PACK_32: L(U6(0)[l] = R(1)[l] | u64(R(2)[l]) << 32);
        case UNPACK_32: L(u64 x = U6(2)[l]; R(0)[l] = u32(x); R(1)[l] = x >> 32);
        case EX2_APPROX_F32: L(F(0)[l] = std::exp2(F(1)[l]));
        case EX2_APPROX_FTZ_F32: L(F(0)[l] = ftz(std::exp2(ftz(F(1)[l]))));
        case LG2_APPROX_F32: L(F(0)[l] = std::log2(F(1)[l]));
        case SQRT_APPROX_F32: L(F(0)[l] = std::sqrt(F(1)[l]));
        case SQRT_APPROX_FTZ_F32: L(F(0)[l] = std::sqrt(ftz(F(1)[l])));
        case DIV_FULL_F32: L(F(0)[l] = F(1)[l] / F(2)[l]);
        case POPC_B32: L(R(0)[l] = __builtin_popcount(R(1)[l]));
        case PRMT_B32: L(R(0)[l] = permute(R(1)[l] | u64(R(2)[l]) << 32, R(3)[l]));
        case ELECT: all(w, m, pc); L(R(0)[l] = 0; P(1) = 1);
        // clang-format on
        // a: bytes per element, b: elements, c: offset | sign << 31 unused; nd: 64-bit destinations (1) and sign (2)
        case LD_GLOBAL:
        case LD_SHARED:
        case ST_GLOBAL:
        case ST_SHARED: {
          int es = op.a, n = op.b, bytes = es * n;
          bool load = op.code == LD_GLOBAL || op.code == LD_SHARED,
               global = op.code == LD_GLOBAL || op.code == ST_GLOBAL;
          const i32* v = load ? o : o + 1;
          int ao = load ? n : 0;
          u64 ga[32];
          u32 sa[32];
          for (int l = 0; l < 32; l++)
            if (m >> l & 1) {
              unsigned char buf[32];
              if (global) ga[l] = U6(ao)[l] + i64(op.c);
              else {
                sa[l] = R(ao)[l] + op.c;
                inside(sa[l], bytes, pc, w.id, l);
              }
              if (!load)
                for (int i = 0; i < n; i++) {
                  if (es == 8) memcpy(buf + 8 * i, (u64*)(reg + size_t(v[i]) * 32) + l, 8);
                  else memcpy(buf + es * i, reg + size_t(v[i]) * 32 + l, es);
                }
              if (global) {
                if (load) gread(ga[l], buf, bytes, pc, w.id, l);
                else gwrite(ga[l], buf, bytes, pc, w.id, l);
              } else if (load) {
                sread(sa[l], bytes, pc, w.id, l);
                memcpy(buf, &memory[sa[l]], bytes);
              } else {
                swrite(sa[l], bytes, pc, w.id, l, buf);
                memcpy(&memory[sa[l]], buf, bytes);
              }
              if (load)
                for (int i = 0; i < n; i++) {
                  u64 x = 0;
                  memcpy(&x, buf + es * i, es);
                  if (op.nd & 2) x = es == 4 ? u64(i64(i32(x))) : es == 2 ? u64(i64(int16_t(x))) : x;
                  if (op.nd & 1) ((u64*)(reg + size_t(v[i]) * 32))[l] = x;
                  else reg[size_t(v[i]) * 32 + l] = u32(x);
                }
            }
          if (global) sectors(s, ga, m, bytes);
          else waves(s, sa, m, bytes);
          break;
        }
        // operands: shared address, global address, source size (or -1 slot); a: bytes, b, c: offsets
        case CP_ASYNC: {
          u64 ga[32];
          u32 sa[32], some = 0;
          for (int l = 0; l < 32; l++)
            if (m >> l & 1) {
              sa[l] = R(0)[l] + op.b;
              ga[l] = U6(1)[l] + i64(op.c);
              inside(sa[l], op.a, pc, w.id, l);
              u32 n = o[2] < 0 ? op.a : R(2)[l];
              if (n && n != (u32)op.a) say(true, pc, w.id, l, "partial cp.async of %u bytes", n);
              Copy c{sa[l], op.a, {0}};
              if (n) gread(ga[l], c.data, n, pc, w.id, l), some |= 1u << l;
              swrite(sa[l], op.a, pc, w.id, l, nullptr);
              memset(&memory[sa[l]], 0xff, op.a);
              for (u32 x = sa[l]; x < sa[l] + op.a; x++) state[x].copies++;
              w.open.push_back(c);
            }
          sectors(s, ga, some, op.a);
          waves(s, sa, m, op.a);
          break;
        }
          // clang-format off
        case CP_ASYNC_COMMIT_GROUP: all(w, m, pc); w.groups.push_back(std::move(w.open)); w.open.clear(); break;
        case BAR: all(w, m, pc); w.waiting = true; return;
        case BAR_WARP_SYNC: break;
        case MMA_BF16: all(w, m, pc); mma(w, o, 0); break;
        case MMA_F16: all(w, m, pc); mma(w, o, 1); break;
        case MMA_TF32: all(w, m, pc); mma(w, o, 2); break;
        // clang-format on
        case CP_WAIT:
          all(w, m, pc);
          for (; (int)w.groups.size() > op.a; w.groups.pop_front()) land(w, w.groups.front(), pc);
          break;
        case SHFL_BFLY:
        case SHFL_IDX: {
          all(w, m, pc);
          u32 from[32], by[32];
          memcpy(from, R(1), 128);
          memcpy(by, R(2), 128);
          for (int l = 0; l < 32; l++) {
            if (R(3)[l] != 31) say(true, pc, w.id, l, "shfl clamp %u", R(3)[l]);
            R(0)[l] = from[(op.code == SHFL_IDX ? by[l] : l ^ by[l]) & 31];
          }
          break;
        }
        case LDMATRIX:  // a: matrices, b: trans, c: offset
        case STMATRIX: {
          all(w, m, pc);
          bool load = op.code == LDMATRIX;
          u32 from[32], out[4][32];
          memcpy(from, R(load ? op.a : 0), 128);
          for (int i = 0; i < op.a; i++) {
            uint16_t M[8][8];
            u32 sa[8];
            for (int l = 0; l < 32 && !load; l++)
              for (int j = 0; j < 2; j++) (op.b ? M[l % 4 * 2 + j][l / 4] : M[l / 4][l % 4 * 2 + j]) = R(1 + i)[l] >> j * 16;
            for (int r = 0; r < 8; r++) {
              u32 a = sa[r] = from[i * 8 + r] + op.c;
              inside(a, 16, pc, w.id, i * 8 + r);
              if (load) sread(a, 16, pc, w.id, i * 8 + r);
              else swrite(a, 16, pc, w.id, i * 8 + r, (unsigned char*)M[r]);
              load ? memcpy(M[r], &memory[a], 16) : memcpy(&memory[a], M[r], 16);
            }
            waves(s, sa, 255, 16);
            for (int l = 0; l < 32; l++) {
              int q = l % 4 * 2, p = l / 4;
              out[i][l] = op.b ? M[q][p] | u32(M[q + 1][p]) << 16 : M[p][q] | u32(M[p][q + 1]) << 16;
            }
          }
          for (int i = 0; i < op.a && load; i++) memcpy(R(i), out[i], 128);
          break;
        }
        case WGMMA: {
          all(w, m, pc);
          int n = op.a / 2, na = op.b >> 4 & 1 ? 4 : 1;
          Product g{&op, na == 1 ? U6(n)[0] : 0, U6(n + na)[0], bool(P(n + na + 1) & 1)};
          if (!w.fence_seen && w.product_groups.empty() && w.open_products.empty())
            say(false, pc, w.id, 0, "wgmma with no wgmma.fence before it");
          mark(w, g, 1, true, pc);
          w.open_products.push_back(g);
          break;
        }
          // clang-format off
        case WGMMA_FENCE_SYNC_ALIGNED: all(w, m, pc); w.fence_seen = true; break;
        case WGMMA_COMMIT_GROUP_SYNC_ALIGNED: all(w, m, pc); w.product_groups.push_back(w.open_products); w.open_products.clear(); break;
        // clang-format on
        case WG_WAIT:
          all(w, m, pc);
          for (; (int)w.product_groups.size() > op.a; w.product_groups.pop_front())
            for (Product& g : w.product_groups.front()) multiply(w, g, pc);
          if (w.product_groups.empty()) w.fence_seen = false;
          break;
        case FENCE_PROXY_ASYNC_SHARED_CTA: w.fenced = now; break;
        case MB_INIT:
        case MB_INVAL:
        case MB_EXPECT: {
          int l = __builtin_ctz(m);
          u32 a = R(0)[l];
          if (op.code == MB_INVAL) barrier(a, pc, w.id);
          if (op.code == MB_EXPECT) {
            Bar& b = barrier(a, pc, w.id);
            b.tx += R(1)[l];
            b.arrived++;
            settle(b);
            break;
          }
          forget(a);
          if (op.code == MB_INVAL) break;
          bars.push_back(Bar{a, (int)R(1)[l], 0, 0, 0});
          swrite(a, 8, pc, w.id, l, nullptr);
          break;
        }
        case MB_TRY: {
          Bar& b = barrier(R(1)[0], pc, w.id);
          if (((b.phase ^ 1) & 1) != (int)(R(2)[0] & 1)) {
            w.pc = pc, s[CNT]--, w.waiting = true, polls++;
            return;
          }
          P(0) = ~0u;
          break;
        }
        case TMA_2D: {  // operands: shared address, map index (64 bit), x, y, mbarrier
          int l = __builtin_ctz(m);
          u32 dst = R(0)[l];
          TensorMap& t = maps[U6(1)[l]];
          i64 x0 = I(2)[l], y0 = I(3)[l];
          Bar& b = barrier(R(4)[l], pc, w.id);
          i64 n = 0;
          for (i64 y = 0; y < t.box[1]; y++)
            for (i64 x = 0; x < t.box[0]; x++) {
              u32 a = dst + u32((y * t.box[0] + x) * t.es);
              u32 sw = t.swizzle == 3 ? 7 : t.swizzle == 2 ? 3 : t.swizzle == 1 ? 1 : 0;
              a ^= ((a >> 7) & sw) << 4;
              inside(a, t.es, pc, w.id, l);
              swrite(a, t.es, pc, w.id, l, nullptr);
              for (u32 g = a; g < a + t.es; g++) state[g].writer = -1;
              bool in = x0 + x >= 0 && x0 + x < t.dims[0] && y0 + y >= 0 && y0 + y < t.dims[1];
              if (in) gread(t.base + (y0 + y) * t.stride + (x0 + x) * t.es, &memory[a], t.es, pc, w.id, l);
              else memset(&memory[a], 0, t.es);
              n += t.es;
            }
          s[SECTORS] += n / 32;
          s[BYTES] += n;
          b.tx -= n;
          settle(b);
          break;
        }
        case BRA: {
          if (m == w.mask) w.pc = op.a;
          else w.other.push_back({op.a, m}), w.mask &= ~m;
          break;
        }
        case RET: w.mask &= ~m; break;
        default: say(true, pc, w.id, 0, "no such opcode");
      }
    }
  }

  void block() {
    memory.assign(BASE + shared, 0xff);
    state.assign(BASE + shared, Byte());
    epoch = now = 1;
    bars.clear();
    regs.resize(size_t(num_slots) * 32 * num_warps);
    warps.assign(num_warps, Warp());
    for (int i = 0; i < num_warps; i++) {
      Warp& w = warps[i];
      w.id = i, w.mask = ~0u;
      w.reg = regs.data() + size_t(i) * num_slots * 32;
      memcpy(w.reg, initial, size_t(num_slots) * 128);
      for (int l = 0; l < 32; l++) {
        w.reg[spec[0] * 32 + l] = i * 32 + l;
        for (int d = 0; d < 3; d++) w.reg[spec[1 + d] * 32 + l] = cta[d];
      }
    }
    while (true) {
      bool all_done = true;
      u64 before = polls;
      for (int i = 0; i < num_warps; i++) {
        Warp& w = warps[reverse ? num_warps - 1 - i : i];
        if (w.done || w.waiting) {
          all_done &= w.done;
          continue;
        }
        run(w);
        all_done &= w.done;
      }
      if (all_done) break;
      bool spinning = polls != before;
      if (spinning)
        for (Warp& w : warps) w.waiting &= ops[w.pc].code != MB_TRY;
      if (polls > 100000000) say(true, 0, 0, 0, "mbarrier never completes");
      bool every = true;
      for (Warp& w : warps) every &= w.done || (w.waiting && ops[w.pc - 1].code == BAR);
      if (every) {
        int at = -1;
        for (Warp& w : warps)
          if (!w.done) {
            if (at < 0) at = w.pc;
            if (w.pc != at) say(true, w.pc, w.id, 0, "warps wait at different barriers");
            w.waiting = false;
          }
        for (Warp& w : warps)
          if (w.done) say(false, 0, w.id, 0, "a warp ended while others wait at a barrier");
        epoch++;
      } else if (!spinning) say(true, 0, 0, 0, "deadlock");
    }
    for (Warp& w : warps)
      if (w.product_groups.size() || w.open_products.size())
        say(false, 0, w.id, 0, "ended with a wgmma not waited for");
  }
};

extern "C" int ptx_run(const Op* ops, int num_ops, const i32* operands, const u32* initial, int num_slots,
                       const i32* spec, int num_warps, u32 shared, int gx, int gy, int gz, Range* ranges,
                       int num_ranges, TensorMap* maps, i64* stats, char* message, int message_size, int reverse) {
  message[0] = 0;
  Machine m{ops, num_ops, operands, initial,    num_slots, spec,  num_warps, shared,       gx,
            gy,  gz,      ranges,   num_ranges, maps,      stats, message,   message_size, reverse};
  try {
    for (u32 i = 0, n = gx * gy * gz; i < n; i++) {
      u32 j = m.ctaid = reverse ? n - 1 - i : i;
      m.cta[0] = j % gx, m.cta[1] = j / gx % gy, m.cta[2] = j / gx / gy;
      m.block();
    }
  } catch (std::runtime_error&) {}
  return m.errors;
}
