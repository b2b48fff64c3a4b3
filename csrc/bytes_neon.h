// What the ARM kernels of int8 have in common, with dot products or without; included as slices.h is.

struct SumsS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  using Sum = int32x4x4_t;
  static Sum load_sum(const int32_t* p) { return vld1q_s32_x4(p); }
  static void store_sum(int32_t* p, const Sum& v) { vst1q_s32_x4(p, v); }
};

// One lookup fetches the codes of four features.
struct OperandsOfTableS8 : SumsS8 {
  static constexpr int kSums = 4;
  struct Operands {
    uint8x16x4_t index;
    int8x16x4_t weight;
  };
  static constexpr int64_t kIndexBytes = 4 * GROUP, kWeightBytes = 4 * GROUP;
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    return {vld1q_u8_x4(indices), vld1q_s8_x4(reinterpret_cast<const int8_t*>(weights))};
  }
};

struct OperandsOfBlocksS8 : SumsS8 {
  using Operand = int8x16x4_t;
  static constexpr int kBytes = 64, kSteps = 1;
  static constexpr bool kHasRelu = false;
  static constexpr int input(int) { return 0; }
  static Operand load(const uint8_t* block, int) { return vld1q_s8_x4(reinterpret_cast<const int8_t*>(block)); }
  static uint32_t quad_of(const uint8_t* x) {
    uint32_t quad;
    __builtin_memcpy(&quad, x, sizeof(quad));
    return quad;
  }
};
