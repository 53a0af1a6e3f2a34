package frontend

import (
	"errors"
	"fmt"
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Limits bounds every size, count and time that a client controls. A zero field takes its default.
type Limits struct {
	// MaxReceiveBytes bounds one gRPC message that a client sends. 32 MiB by default: clients pack
	// batches by their data alone, so it must be several times MaxBatchBytes (row BUB-13).
	MaxReceiveBytes int
	// MaxResponseBytes bounds one gRPC message that is sent. 4 MiB - 64 KiB by default, since clients
	// keep gRPC's limit of 4 MiB (row GEN-27).
	MaxResponseBytes int
	// MaxBatchBytes is the advertised max_batch_total_size_bytes. 4 MiB - 128 KiB by default.
	MaxBatchBytes int64
	// MaxDigests bounds the digests in one request. 40 000 by default, whose answers fit into
	// MaxResponseBytes; of a digest function with longer hashes than SHA-256 as many as fit.
	MaxDigests int
	// MaxBlobBytes is the advertised max_cas_blob_size_bytes. 64 GiB by default.
	MaxBlobBytes int64
	// BatchConcurrency bounds the blobs of one request that are read or written at once. 32 by default.
	BatchConcurrency int
	// ReadChunkBytes bounds the data of one ReadResponse. 512 KiB by default, at most 1 MiB.
	ReadChunkBytes int

	// MaxTreeDirectories and MaxTreeBytes bound what one GetTree visits. 250 000 and 512 MiB by default.
	MaxTreeDirectories int
	MaxTreeBytes       int64

	// MaxChunks bounds the chunks of one blob in the calls about them. 1 000 000 by default.
	MaxChunks int
	// ChunkCalls bounds the calls that split or splice a blob at once, each of which takes some 12 MiB
	// with chunks of the usual size. 4 by default; more wait.
	ChunkCalls int
	// KnownChunks bounds the digests of chunks that are remembered, 40 to 72 bytes each. 500 000 by default.
	KnownChunks int

	// MaxActionBytes and MaxCommandBytes bound the messages read for an Execute. 1 MiB and 16 MiB by default.
	MaxActionBytes  int64
	MaxCommandBytes int64
	// MaxActionTimeout is the longest Action.timeout that is accepted. 24 h by default; a worker's own
	// maximum may be lower.
	MaxActionTimeout time.Duration
	// MaxResultBytes bounds an ActionResult that a client stores. 3 MiB by default.
	MaxResultBytes int
	// MaxInlineBytes bounds what one answer inlines of stdout, stderr and output files. 1 MiB by default.
	MaxInlineBytes int
	// MaxInlineFiles bounds the output files that a request may ask to inline. 1 000 by default.
	MaxInlineFiles int
	// ExecuteRate bounds the Execute calls per second that this process takes. 20 000 by default.
	ExecuteRate int
	// MaxPageSize bounds the operations in one ListOperations answer. 500 by default.
	MaxPageSize int

	// Stall bounds how long a stream waits for one message to come from or go to its client. 2 min by default.
	Stall time.Duration
	// NoData bounds how long an upload may go on with messages that carry nothing. 10 min by default.
	NoData time.Duration
	// Silence is how long a connection may be silent before its client is asked whether it is there, for
	// which it has a third of that, and a second at least. 1 min by default, 1 s at least.
	Silence time.Duration
	// Handshake bounds the time from a connection to its first call's headers. 20 s by default.
	Handshake time.Duration
	// Unary bounds a unary call as a whole, from its headers on. 5 min by default.
	Unary time.Duration
	// OperationWait bounds one WaitOperation; it is less than Unary. 2 min by default.
	OperationWait time.Duration
	// MaxUploads bounds the ByteStream uploads that are going on in this process, MaxCompressedUploads
	// those among them that need a decoder of up to 8 MiB. 16 384 and 1 024 by default.
	MaxUploads           int
	MaxCompressedUploads int
	// MaxLogReaders bounds who reads the outputs of operations in this process, each with one part of at
	// most 64 KiB. 1 000 by default.
	MaxLogReaders int
	// MaxStreams bounds the concurrent calls of one connection. 10 000 by default.
	MaxStreams uint32
}

// The range of ExecutionPolicy.priority and ResultsCachePolicy.priority (row CAP-14).
const (
	minPriority = -1000
	maxPriority = 1000
)

// Bounds that no deployment needs to change.
const (
	// maxStatusText bounds an error text, so that trailers stay small (row GEN-30).
	maxStatusText = 1 << 10
	// maxViolations bounds the MISSING violations in an ExecuteResponse (row EXA-10).
	maxViolations = 10_000
	// maxTrailerViolations is the same for a gRPC status, which travels in trailers (row GEN-30).
	maxTrailerViolations = 40
	// presentEvery is how often, in bytes received, an upload looks whether another one was faster.
	presentEvery = 4 << 20
	// retryAfter is what RetryInfo tells clients of a transient failure.
	retryAfter = time.Second
)

// withDefaults fills the fields that are zero.
func (l Limits) withDefaults() Limits {
	orDefault(&l.MaxReceiveBytes, 32<<20)
	orDefault(&l.MaxResponseBytes, 4<<20-64<<10)
	orDefault(&l.MaxBatchBytes, 4<<20-128<<10)
	orDefault(&l.MaxDigests, 40_000)
	orDefault(&l.MaxBlobBytes, 64<<30)
	orDefault(&l.BatchConcurrency, 32)
	orDefault(&l.MaxUploads, 16<<10)
	orDefault(&l.MaxCompressedUploads, 1<<10)
	orDefault(&l.ReadChunkBytes, 512<<10)
	orDefault(&l.MaxTreeDirectories, 250_000)
	orDefault(&l.MaxTreeBytes, 512<<20)
	orDefault(&l.MaxChunks, 1_000_000)
	orDefault(&l.ChunkCalls, 4)
	orDefault(&l.KnownChunks, 500_000)
	orDefault(&l.MaxActionBytes, 1<<20)
	orDefault(&l.MaxCommandBytes, 16<<20)
	orDefault(&l.MaxActionTimeout, 24*time.Hour)
	orDefault(&l.MaxResultBytes, 3<<20)
	orDefault(&l.MaxInlineBytes, 1<<20)
	orDefault(&l.MaxInlineFiles, 1000)
	orDefault(&l.ExecuteRate, 20_000)
	orDefault(&l.MaxPageSize, 500)
	orDefault(&l.Stall, 2*time.Minute)
	orDefault(&l.NoData, 10*time.Minute)
	orDefault(&l.Silence, time.Minute)
	orDefault(&l.Handshake, 20*time.Second)
	orDefault(&l.Unary, 5*time.Minute)
	orDefault(&l.OperationWait, 2*time.Minute)
	orDefault(&l.MaxLogReaders, 1000)
	orDefault(&l.MaxStreams, 10_000)
	return l
}

func orDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports every limit that is out of bounds or contradicts another.
func (l Limits) Validate() error {
	l = l.withDefaults()
	var problems []error
	check := func(ok bool, format string, v ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, v...))
		}
	}
	const mostReceived, mostSent = 256 << 20, 4 << 20
	check(l.MaxBatchBytes >= 64<<10, "max batch bytes %d is below 64 KiB", l.MaxBatchBytes)
	check(l.MaxReceiveBytes <= mostReceived, "max receive bytes %d is above %d", l.MaxReceiveBytes, mostReceived)
	check(int64(l.MaxReceiveBytes) >= l.MaxBatchBytes+64<<10, "max receive bytes %d is not 64 KiB above max batch bytes %d", l.MaxReceiveBytes, l.MaxBatchBytes)
	check(l.MaxResponseBytes >= 128<<10 && l.MaxResponseBytes < mostSent, "max response bytes %d is not from 128 KiB to below 4 MiB, what clients receive", l.MaxResponseBytes)
	check(l.MaxBatchBytes < int64(l.MaxResponseBytes), "max batch bytes %d is not below max response bytes %d", l.MaxBatchBytes, l.MaxResponseBytes)
	check(l.MaxDigests > 0 && l.MaxDigests <= l.room(digest.SHA256), "max digests %d is not from 1 to %d, what max response bytes has room for", l.MaxDigests, l.room(digest.SHA256))
	check(l.MaxBlobBytes >= l.MaxBatchBytes, "max blob bytes %d is below max batch bytes %d", l.MaxBlobBytes, l.MaxBatchBytes)
	check(l.BatchConcurrency > 0 && l.BatchConcurrency <= 1024, "batch concurrency %d is not from 1 to 1024", l.BatchConcurrency)
	check(l.ReadChunkBytes >= 4<<10 && l.ReadChunkBytes <= 1<<20, "read chunk bytes %d is not from 4 KiB to 1 MiB", l.ReadChunkBytes)
	check(l.MaxUploads > 0 && l.MaxCompressedUploads > 0, "max uploads %d and max compressed uploads %d are not positive", l.MaxUploads, l.MaxCompressedUploads)
	check(l.MaxLogReaders > 0, "max log readers %d is not positive", l.MaxLogReaders)
	check(l.MaxTreeDirectories > 0, "max tree directories %d is not positive", l.MaxTreeDirectories)
	check(l.MaxTreeBytes > 0, "max tree bytes %d is not positive", l.MaxTreeBytes)
	check(l.MaxChunks > 0 && l.MaxChunks <= 10_000_000, "max chunks %d is not from 1 to 10000000", l.MaxChunks)
	check(l.ChunkCalls > 0 && l.ChunkCalls <= 1024, "chunk calls %d is not from 1 to 1024", l.ChunkCalls)
	check(l.KnownChunks > 0, "known chunks %d is not positive", l.KnownChunks)
	check(l.MaxActionBytes > 0 && l.MaxActionBytes <= mostReceived, "max action bytes %d is not from 1 to %d", l.MaxActionBytes, mostReceived)
	check(l.MaxCommandBytes > 0 && l.MaxCommandBytes <= mostReceived, "max command bytes %d is not from 1 to %d", l.MaxCommandBytes, mostReceived)
	check(l.MaxActionTimeout > 0, "max action timeout %v is not positive", l.MaxActionTimeout)
	check(l.MaxResultBytes > 0 && l.MaxResultBytes < l.MaxResponseBytes, "max result bytes %d is not from 1 to below max response bytes %d", l.MaxResultBytes, l.MaxResponseBytes)
	check(l.MaxInlineBytes >= 0, "max inline bytes %d is negative", l.MaxInlineBytes)
	check(l.MaxInlineFiles >= 0, "max inline files %d is negative", l.MaxInlineFiles)
	check(l.MaxPageSize > 0 && l.MaxPageSize <= 10_000, "max page size %d is not from 1 to 10000", l.MaxPageSize)
	for name, d := range map[string]time.Duration{"stall": l.Stall, "no data": l.NoData, "unary": l.Unary, "operation wait": l.OperationWait, "silence": l.Silence, "handshake": l.Handshake} {
		check(d > 0, "%s bound %v is not positive", name, d)
	}
	check(l.OperationWait < l.Unary, "operation wait %v is not below the bound of unary calls %v", l.OperationWait, l.Unary)
	return errors.Join(problems...)
}

// entryBytes is the most that an answer needs for one digest with a hash of this many digits and a
// status without text: the entry's tag and length, the digest with a size of 9 bytes, and a code.
func entryBytes(digits int) int {
	head := 2 // a tag and a length
	if digits > 96 {
		head = 3 // a length of two bytes
	}
	return head + (head + (head + digits) + 10) + 4
}

// room is how many digests of a function MaxResponseBytes has room for.
func (l Limits) room(f digest.Function) int { return l.MaxResponseBytes / entryBytes(f.HexLen()) }
