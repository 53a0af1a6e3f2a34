#ifndef LIB_SUM_H_
#define LIB_SUM_H_

// Sum returns a + b.
int Sum(int a, int b);

#endif  // LIB_SUM_H_
