package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Probe is a health check for where there is no curl, as in an image with nothing but this program.
type Probe struct {
	URL     string        `arg:"" optional:"" help:"What to ask." default:"http://127.0.0.1:8080/readyz"`
	Timeout time.Duration `help:"How long to wait for the answer." default:"3s"`
}

var errNoAnswer = errors.New("no answer within --timeout")

func (c *Probe) run(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.Timeout, errNoAnswer)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	defer response.Body.Close() //nolint:errcheck // it was only read
	const most = 4 << 10
	text, err := io.ReadAll(io.LimitReader(response.Body, most))
	if err != nil {
		return fmt.Errorf("probe %s: %w", c.URL, err)
	}
	answer := strings.TrimSpace(string(text))
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("probe %s: %s: %s", c.URL, response.Status, answer)
	}
	_, err = fmt.Fprintln(p.out, answer)
	return err
}
