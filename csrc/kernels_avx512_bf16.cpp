// AVX-512 with VBMI, VNNI and BF16 (Sapphire Rapids, Zen 4): pairs of bfloat16 in one instruction.
#define LT4REC_TARGET "avx512f,avx512vl,avx512bw,avx512vbmi,avx512vnni,avx512bf16,avx2,fma"
#define LT4REC_ISA lt4rec_isa_avx512_bf16
#define LT4REC_ISA_NAME "avx512_bf16"
#define LT4REC_HAS_VNNI
#define LT4REC_HAS_BF16
#include "kernels_avx512.h"
