// AVX-512 with VBMI and VNNI (Ice Lake, Zen 4): 64 multiply-adds of int8 in two instructions.
#define LT4REC_TARGET "avx512f,avx512vl,avx512bw,avx512vbmi,avx512vnni,avx2,fma"
#define LT4REC_ISA lt4rec_isa_avx512_vnni
#define LT4REC_ISA_NAME "avx512_vnni"
#define LT4REC_HAS_VNNI
#include "kernels_avx512.h"
