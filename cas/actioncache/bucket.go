package actioncache

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
)

// minBytes is the smallest bucket that is made where the broker has no room to set MaxBytes aside.
const minBytes = 16 << 20

// openBucket makes or updates the stream: a key-value bucket as other clients know it, but that the
// oldest entries give way.
func openBucket(ctx context.Context, js jetstream.JetStream, cfg Config) (jetstream.Stream, error) { //nolint:ireturn // the library has no type for it
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = defaultBytes
		switch s, err := js.Stream(ctx, "KV_"+bucket); {
		case err == nil:
			cfg.MaxBytes = s.CachedInfo().Config.MaxBytes
		case !errors.Is(err, jetstream.ErrStreamNotFound):
			return nil, failure(ctx, err)
		}
	}
	for size := cfg.MaxBytes; ; size /= 4 {
		stream, err := createBucket(ctx, js, cfg.Replicas, size)
		if err == nil {
			return stream, nil
		}
		if err = failure(ctx, err); !errors.Is(err, cas.ErrFull) || size/4 < minBytes {
			return nil, err
		}
		cfg.Log.WarnContext(ctx, "the broker has little room for the action cache", "bytes", size/4, "err", err)
	}
}

func createBucket(ctx context.Context, js jetstream.JetStream, replicas int, size int64) (jetstream.Stream, error) { //nolint:ireturn // the library has no type for it
	return js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name:              "KV_" + bucket,
		Description:       "jetfarm action cache",
		Subjects:          []string{subjectPrefix + ">"},
		MaxMsgsPerSubject: 1,
		MaxBytes:          size,
		Discard:           jetstream.DiscardOld,
		Storage:           jetstream.FileStorage,
		Replicas:          replicas,
		Duplicates:        100 * time.Millisecond,
		AllowRollup:       true,
		// Replicas lag behind: only their leader reads what was just written (row ACU-9).
		AllowDirect: replicas == 1,
		RePublish:   &jetstream.RePublish{Source: subjectPrefix + ">", Destination: newsPrefix + ">", HeadersOnly: true},
	})
}
