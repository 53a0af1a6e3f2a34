#include "lib/sum.h"

int Sum(int a, int b) { return a + b; }
