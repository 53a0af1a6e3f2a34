package digest_test

import (
	"fmt"
	"testing"

	"github.com/jetfarm/jetfarm/cas/digest"
)

func BenchmarkOf(b *testing.B) {
	for _, s := range spaces(b, "") {
		for _, size := range []int{64, 64 << 10} {
			b.Run(fmt.Sprintf("%v/%d", s.Function(), size), func(b *testing.B) {
				data := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					s.Of(data)
				}
			})
		}
	}
}

func BenchmarkParse(b *testing.B) {
	for _, s := range spaces(b, "main") {
		b.Run(s.Function().String(), func(b *testing.B) {
			m := s.Of([]byte("hello")).Proto()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Parse(m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParseRead(b *testing.B) {
	for _, s := range spaces(b, "main") {
		b.Run(s.Function().String(), func(b *testing.B) {
			name := s.Of([]byte("hello")).String()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := digest.ParseRead(name); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkNew(b *testing.B) {
	for _, f := range digest.Functions() {
		b.Run(f.String(), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f.New()
			}
		})
	}
}
